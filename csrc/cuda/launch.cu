// What is not a kernel: the table of rows, and what was built and what is there.
#include <cstring>

#include "common.cuh"

namespace pydist::cuda {

Rows::Rows(uint64_t table_address, int64_t n_rows, int64_t total_words,
           const std::vector<int64_t>& inline_row)
    : table(reinterpret_cast<const Row*>(table_address)),
      count(n_rows),
      words(total_words),
      only{} {
  if (table || n_rows == 0) return;  // an empty tensor has no address
  if (n_rows != 1) {
    throw std::invalid_argument("Rows: without a table there is one row, not " +
                                std::to_string(n_rows));
  }
  constexpr size_t kFields = sizeof(Row) / sizeof(int64_t);
  if (inline_row.size() != kFields) {
    throw std::invalid_argument("Rows: without a table, inline_row must have " +
                                std::to_string(kFields) + " fields, has " +
                                std::to_string(inline_row.size()));
  }
  std::memcpy(&only, inline_row.data(), sizeof(Row));
}

std::string build_description() {
  std::string text = "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                     std::to_string(CUDART_VERSION % 1000 / 10);
#if defined(__CUDA_ARCH_LIST__)
  for (const int arch : {__CUDA_ARCH_LIST__}) text += " sm_" + std::to_string(arch / 10);
#endif
  return text;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver or no device is an answer here, not an error to keep
  return 0;
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "device_name");
  return properties.name;
}

}  // namespace pydist::cuda

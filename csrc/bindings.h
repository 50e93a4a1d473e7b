// Kernels as Python functions over raw addresses: what their signatures say, in integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "cuda/launch.h"
#include "wire/layout.h"

namespace pydist {

// Rows of a kernel on the CPU: a tuple of the address and the length of a table, or of the nine
// numbers of one row.
struct CpuRows {
  Row only;
  const Row* table;  // null: `only`
  int64_t count;
  const Row* begin() const { return table ? table : &only; }
};

template <typename T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// What stands in Python for a parameter of a kernel: addresses and enumerations are integers.
template <typename T>
struct Number {
  using type = T;
  static T value(T x) { return x; }
};
template <typename T>
struct Number<T*> {
  using type = uint64_t;
  static T* value(uint64_t address) { return at<T>(address); }
};
template <>
struct Number<DType> {
  using type = int;
  static DType value(int x) { return static_cast<DType>(x); }
};
template <typename T>
using number = typename Number<T>::type;

template <typename... Args>
auto on_cpu(void (*kernel)(const Row*, int64_t, Args...)) {
  return [kernel](const CpuRows& rows, number<Args>... args) {
    kernel(rows.begin(), rows.count, Number<Args>::value(args)...);
  };
}

template <typename R, typename... Args>
auto over_bytes(R (*function)(Args...)) {
  return [function](number<Args>... args) { return function(Number<Args>::value(args)...); };
}

#if defined(PYDIST_CUDA)
template <typename... Args>
auto on_cuda(void (*kernel)(const cuda::Rows&, Args...)) {
  return [kernel](const cuda::Rows& rows, number<Args>... args) {
    kernel(rows, Number<Args>::value(args)...);
  };
}
#endif

// The numbers of one row, from a tuple.
inline Row row_of(const pybind11::tuple& numbers) {
  int64_t x[9];
  for (int i = 0; i < 9; ++i) x[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(numbers.ptr(), i));
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8]};
}

}  // namespace pydist

namespace pybind11::detail {

template <>
struct type_caster<pydist::CpuRows> {
  PYBIND11_TYPE_CASTER(pydist::CpuRows, const_name("tuple[int, ...]"));
  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr())) return false;
    const auto numbers = reinterpret_borrow<tuple>(source);
    if (numbers.size() == 9) {
      value = {pydist::row_of(numbers), nullptr, 1};
    } else if (numbers.size() == 2) {
      value = {
          {}, pydist::at<pydist::Row>(numbers[0].cast<uint64_t>()), numbers[1].cast<int64_t>()};
    } else {
      return false;
    }
    return true;
  }
};

#if defined(PYDIST_CUDA)
// The same with the amount of work at the end, and tables in device memory.
template <>
struct type_caster<pydist::cuda::Rows> {
  PYBIND11_TYPE_CASTER(pydist::cuda::Rows, const_name("tuple[int, ...]"));
  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr())) return false;
    const auto numbers = reinterpret_borrow<tuple>(source);
    if (numbers.size() == 10) {
      value = {nullptr, 1, numbers[9].cast<int64_t>(), pydist::row_of(numbers)};
    } else if (numbers.size() == 3) {
      value = {pydist::at<const pydist::Row>(numbers[0].cast<uint64_t>()),
               numbers[1].cast<int64_t>(),
               numbers[2].cast<int64_t>(),
               {}};
    } else {
      return false;
    }
    return true;
  }
};

// Memory for sums: a tuple of its address and how many blocks it holds.
template <>
struct type_caster<pydist::cuda::TopKSlots> {
  PYBIND11_TYPE_CASTER(pydist::cuda::TopKSlots, const_name("tuple[int, int]"));
  bool load(handle source, bool) {
    const auto numbers = source.cast<std::pair<uint64_t, int64_t>>();
    value = {pydist::at<float>(numbers.first), numbers.second};
    return true;
  }
};
#endif

}  // namespace pybind11::detail

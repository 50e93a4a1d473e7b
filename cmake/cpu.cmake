# CPU kernels, once for each instruction set of the processor built for. Included by CMakeLists.txt
# and by tests/aarch64, which builds them for another processor.
#
# Gives pydist_flags (for every C++ source), PYDIST_CPU_SOURCES (what calls the kernels) and
# PYDIST_CPU_OBJECTS (the kernels).

# ---------------------------------------------------------------- flags of every C++ source

# All backends answer with the same bits, so a * b + c is never fused and -ffast-math is never on.
add_library(pydist_flags INTERFACE)
target_compile_options(
  pydist_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-O3;-Wall;-Wextra;-ffp-contract=off>)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(PYDIST_X86 ON)
  target_compile_definitions(pydist_flags INTERFACE PYDIST_X86)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(PYDIST_AARCH64 ON)
  target_compile_definitions(pydist_flags INTERFACE PYDIST_AARCH64)
endif()

# ---------------------------------------------------------------- the kernels

# pydist_isa(<namespace> <table> [flag...]): the kernels once more, for one instruction set.
function(pydist_isa isa table)
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc/cpu/kernels/*.cpp)
  list(APPEND sources ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc/cpu/table.cpp)
  add_library(pydist_${isa} OBJECT ${sources})
  string(TOUPPER ${isa} vectors)
  target_compile_definitions(
    pydist_${isa} PRIVATE PYDIST_ISA=${isa} PYDIST_TABLE=${table} PYDIST_SIMD_${vectors})
  target_compile_options(pydist_${isa} PRIVATE ${ARGN})
  target_link_libraries(pydist_${isa} PRIVATE pydist_flags)
  set(PYDIST_CPU_OBJECTS ${PYDIST_CPU_OBJECTS} $<TARGET_OBJECTS:pydist_${isa}> PARENT_SCOPE)
endfunction()

pydist_isa(scalar kScalar)
if(PYDIST_X86)
  set(avx2 -mavx2 -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND avx512 -Wno-maybe-uninitialized -Wno-uninitialized)  # GCC 12 warns inside its own intrinsics header
  endif()
  pydist_isa(avx2 kAvx2 ${avx2})
  pydist_isa(avx512 kAvx512 ${avx512})
elseif(PYDIST_AARCH64)
  pydist_isa(neon kNeon -mcpu=generic+crc)  # zig takes no -march
endif()

set(PYDIST_CPU_SOURCES ${CMAKE_CURRENT_LIST_DIR}/../csrc/cpu/driver.cpp
                       ${CMAKE_CURRENT_LIST_DIR}/../csrc/cpu/thread_pool.cpp)

# CUDA for pydist._C: whether, for which architectures, and the kernels. Included by CMakeLists.txt.

# ---------------------------------------------------------------- whether

if(PYDIST_CUDA MATCHES "^(0|OFF|NO|FALSE)$")
  message(STATUS "pydist: CPU only (PYDIST_CUDA=${PYDIST_CUDA})")
  return()
elseif(NOT PYDIST_CUDA MATCHES "^(|auto|1|ON|YES|TRUE)$")
  message(FATAL_ERROR "PYDIST_CUDA must be 0, 1 or unset, not '${PYDIST_CUDA}'")
endif()

if(NOT CMAKE_CUDA_COMPILER)
  find_program(
    PYDIST_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda
    PATH_SUFFIXES bin)
  if(DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  elseif(PYDIST_NVCC)
    set(CMAKE_CUDA_COMPILER "${PYDIST_NVCC}")
  endif()
endif()
set(known_archs "")
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known_archs)
endif()
if(NOT known_archs)  # not there, or it doesn't run
  if(PYDIST_CUDA MATCHES "^(|auto)$")
    message(STATUS "pydist: CPU only (no nvcc that works was found)")
    return()
  endif()
  message(FATAL_ERROR "PYDIST_CUDA=${PYDIST_CUDA} asks for CUDA, but no nvcc that works was found. "
                      "Put one on PATH, or set CUDA_HOME or CUDACXX; PYDIST_CUDA=0 builds for the "
                      "CPU only.")
endif()

# ---------------------------------------------------------------- for which architectures

# "7.5;8.0 9.0+PTX", as PyTorch spells it, to "75-real;80-real;90" (CMake's plain 90 is both).
function(pydist_translate_archs list result)
  string(REGEX REPLACE "[ ,]+" ";" list "${list}")
  set(archs "")
  foreach(arch IN LISTS list)
    if(NOT arch MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: '${arch}' is not of the form 9.0 or 9.0+PTX")
    endif()
    if(CMAKE_MATCH_3)
      list(APPEND archs "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    else()
      list(APPEND archs "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
    endif()
  endforeach()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

# The cards of this machine, or else those from T4 on that this nvcc knows, and PTX of the last.
function(pydist_default_archs result)
  set(archs "")
  find_program(PYDIST_NVIDIA_SMI nvidia-smi)
  if(PYDIST_NVIDIA_SMI)
    execute_process(
      COMMAND "${PYDIST_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE cards
      ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" cards "${cards}")
    list(TRANSFORM cards REPLACE "\\." "")
    list(REMOVE_DUPLICATES cards)
    list(TRANSFORM cards APPEND "-real" OUTPUT_VARIABLE archs)
  endif()
  if(NOT archs)
    foreach(arch 75 80 90 100 120)
      if(known_archs MATCHES "compute_${arch}\n")
        list(APPEND archs "${arch}-real")
        set(last ${arch})
      endif()
    endforeach()
    list(APPEND archs "${last}-virtual")
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  if(NOT "$ENV{CMAKE_CUDA_ARCHITECTURES}" STREQUAL "")
    string(REGEX REPLACE "[ ,]+" ";" CMAKE_CUDA_ARCHITECTURES "$ENV{CMAKE_CUDA_ARCHITECTURES}")
  elseif(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    pydist_translate_archs("$ENV{TORCH_CUDA_ARCH_LIST}" CMAKE_CUDA_ARCHITECTURES)
  else()
    pydist_default_archs(CMAKE_CUDA_ARCHITECTURES)
  endif()
endif()
string(REPLACE ";" " " arch_text "${CMAKE_CUDA_ARCHITECTURES}")
message(STATUS "pydist: CUDA for ${arch_text} with ${CMAKE_CUDA_COMPILER} "
               "(PYDIST_CUDA=0 builds for the CPU only)")

# ---------------------------------------------------------------- the kernels

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/kernels/*.cu)
add_library(pydist_cuda OBJECT ${cuda_sources})
target_compile_definitions(pydist_cuda PRIVATE PYDIST_CUDA)
target_compile_options(
  pydist_cuda PRIVATE --fmad=false "-Xcompiler=-Wall,-Wextra,-ffp-contract=off"
                      -lineinfo -Xfatbin=-compress-all  # profilers see lines, at a seventh the size
                      $<$<BOOL:${PYDIST_PTXAS}>:-Xptxas=-v>)
target_link_libraries(pydist_cuda PRIVATE pydist_flags)

target_compile_definitions(_C PRIVATE PYDIST_CUDA)
target_sources(_C PRIVATE $<TARGET_OBJECTS:pydist_cuda>)
target_link_libraries(_C PRIVATE CUDA::cudart_static)
# torch puts its own libcudart into the global symbol scope; ours must not be bound to it.
target_link_options(_C PRIVATE -Wl,--exclude-libs,ALL)

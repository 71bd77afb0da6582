#!/bin/sh
# build.sh OUT: compiles the fake libraries of this folder into OUT, under the names of the real ones.
set -e
here=$(cd "$(dirname "$0")" && pwd)
out=$1
mkdir -p "$out"
flags="-std=c11 -D_GNU_SOURCE -O1 -g -fPIC -shared -pthread -Wall -Wextra -Werror -Wno-missing-prototypes"
includes="-I../../csrc/include -I../../csrc/cuda"
cc=${CC:-gcc}
cd "$here"
$cc $flags $includes -Wl,-soname,libcuda.so.1 fake_cuda.c fake_gpu.c fake_copy.c fake_memory.c -ldl \
    -o "$out/libcuda.so.1"
$cc $flags -Wl,-soname,libcudart.so.13 -Wl,--version-script,fake_cudart.map -Wl,-rpath,'$ORIGIN' \
    fake_cudart.c fake_cudart_stream.c fake_cudart_absent.c "$out/libcuda.so.1" \
    -o "$out/libcudart.so.13"
$cc $flags -Wl,-soname,libcufile.so.0 -Wl,-rpath,'$ORIGIN' fake_cufile.c "$out/libcuda.so.1" \
    -o "$out/libcufile.so.0"
$cc $flags -fvisibility=hidden -Wl,-soname,libnccl.so.2 fake_nccl*.c -ldl -o "$out/libnccl.so.2"

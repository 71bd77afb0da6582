/*
 * cuda_image.c: the kernels, as setup.py had nvcc compile them.
 *
 * The numbers are generated under build/, and only where nvcc is found; without them this file is
 * all there is, and what needs kernels is done another way.
 */
#include "cuda_image.h"

#include <stddef.h>
#include <stdint.h>

#if __has_include("kernels_image.inc")

static const _Alignas(16) uint64_t image[] = {
#include "kernels_image.inc"
};

const void *
cuda_image(void)
{
    return image;
}

#else

const void *
cuda_image(void)
{
    return NULL;
}

#endif

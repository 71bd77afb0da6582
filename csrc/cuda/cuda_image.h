/*
 * cuda_image.h: private: the kernels, compiled.
 */
#ifndef DCP_CUDA_IMAGE_H
#define DCP_CUDA_IMAGE_H

/* A fat binary for the driver; NULL in a build that had no nvcc. */
const void *cuda_image(void);

#endif

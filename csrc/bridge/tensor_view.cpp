/*
 * tensor_view.cpp: a torch tensor as pointer, sizes, strides and flags.
 *
 * The Python object of a tensor and the two classes are declared here as python_variable.h has
 * them, whose includes cost half a minute of build time; the module tries them once at import.
 *
 * Reading never runs Python code for a plain tensor and never materialises copy-on-write memory.
 * Subclasses may answer by Python code or with symbols instead of sizes: what they refuse to say
 * stays zero, and its flag with it.
 *
 * Threads: every function needs the GIL.
 */
#include <Python.h> /* must be first */

#include "bridge.h"

#include <ATen/core/TensorBase.h>
#include <c10/core/TensorImpl.h>
#include <torch/headeronly/version.h>

#include <algorithm>

#include "dcp_limits.h"

/* As in torch/csrc/autograd/python_variable.h; at::Tensor adds no data to TensorBase. */
struct THPVariable {
    PyObject_HEAD at::TensorBase cdata;
};
extern PyObject *THPVariableClass;
extern PyObject *ParameterClass;

namespace
{

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
#define DCP_TORCH_HAS_BCOMPLEX32 1
#endif

/* X(torch's name, ours).  Not here: int1 to uint7 and quint4x2, which have no whole elements. */
#define DCP_TORCH_TYPES(X)                                                                         \
    X(Byte, UINT8)                                                                                 \
    X(Char, INT8)                                                                                  \
    X(Short, INT16)                                                                                \
    X(Int, INT32)                                                                                  \
    X(Long, INT64)                                                                                 \
    X(Half, FLOAT16)                                                                               \
    X(Float, FLOAT32)                                                                              \
    X(Double, FLOAT64)                                                                             \
    X(ComplexHalf, COMPLEX32)                                                                      \
    X(ComplexFloat, COMPLEX64)                                                                     \
    X(ComplexDouble, COMPLEX128)                                                                   \
    X(Bool, BOOL)                                                                                  \
    X(BFloat16, BFLOAT16)                                                                          \
    X(UInt16, UINT16)                                                                              \
    X(UInt32, UINT32)                                                                              \
    X(UInt64, UINT64)                                                                              \
    X(Float8_e4m3fn, FLOAT8_E4M3FN)                                                                \
    X(Float8_e4m3fnuz, FLOAT8_E4M3FNUZ)                                                            \
    X(Float8_e5m2, FLOAT8_E5M2)                                                                    \
    X(Float8_e5m2fnuz, FLOAT8_E5M2FNUZ)                                                            \
    X(Float8_e8m0fnu, FLOAT8_E8M0FNU)                                                              \
    X(Float4_e2m1fn_x2, FLOAT4_E2M1FN_X2)                                                          \
    X(Bits8, BITS8)                                                                                \
    X(Bits16, BITS16)                                                                              \
    X(Bits1x8, BITS1X8)                                                                            \
    X(Bits2x4, BITS2X4)                                                                            \
    X(Bits4x2, BITS4X2)                                                                            \
    X(QInt8, QINT8)                                                                                \
    X(QUInt8, QUINT8)                                                                              \
    X(QInt32, QINT32)

uint16_t
dtype_of(c10::ScalarType type)
{
    switch (type) {
#define X(torch_name, name)                                                                        \
    case c10::ScalarType::torch_name:                                                              \
        return DCP_DTYPE_##name;
        DCP_TORCH_TYPES(X)
#undef X
#ifdef DCP_TORCH_HAS_BCOMPLEX32
    case c10::ScalarType::BComplex32:
        return DCP_DTYPE_BCOMPLEX32;
#endif
    default:
        return DCP_DTYPE_NONE;
    }
}

/* False only when no two elements can share memory: by ascending stride, each dimension steps over
 * all that the ones before can reach. */
bool
may_overlap(const c10::TensorImpl *impl, const struct dcp_tensor_view *view)
{
    if (impl->numel() <= 1 || impl->is_non_overlapping_and_dense()) {
        return false;
    }
    if (view->ndim > DCP_MAX_DIMS) {
        return true;
    }
    uint32_t order[DCP_MAX_DIMS];
    for (uint32_t i = 0; i < view->ndim; i++) {
        order[i] = i;
    }
    std::sort(order, order + view->ndim,
              [view](uint32_t a, uint32_t b) { return view->strides[a] < view->strides[b]; });
    int64_t reach = 0;
    for (uint32_t i = 0; i < view->ndim; i++) {
        int64_t size = view->sizes[order[i]];
        int64_t stride = view->strides[order[i]];
        if (size > 1) {
            if (stride <= reach) {
                return true;
            }
            reach += (size - 1) * stride;
        }
    }
    return false;
}

/* What needs no memory.  May throw half way: wrappers can answer by Python code or with symbols. */
void
fill_shape(const c10::TensorImpl *impl, struct dcp_tensor_view *view)
{
    view->dtype = dtype_of(impl->dtype().toScalarType());
    view->item_bytes = static_cast<uint32_t>(impl->itemsize());
    view->flags |= view->dtype != DCP_DTYPE_NONE ? DCP_TENSOR_HAS_TYPE : 0;
    view->flags |= impl->requires_grad() ? DCP_TENSOR_REQUIRES_GRAD : 0;
    view->flags |= impl->is_conj() ? DCP_TENSOR_CONJ : 0;
    view->flags |= impl->is_neg() ? DCP_TENSOR_NEG : 0;

    c10::Device device = impl->device();
    view->device_index = device.index();
    view->flags |= device.is_cpu() ? DCP_TENSOR_CPU : 0;
    view->flags |= device.is_cuda() ? DCP_TENSOR_CUDA : 0;
    view->flags |= device.is_meta() ? DCP_TENSOR_META : 0;

    if (impl->is_nested() || impl->has_symbolic_sizes_strides()) {
        return;
    }
    c10::IntArrayRef sizes = impl->sizes();
    view->ndim = static_cast<uint32_t>(sizes.size());
    view->sizes = sizes.data();
    if (impl->layout() != c10::kStrided || impl->is_quantized()) {
        return;
    }
    view->strides = impl->strides().data();
    view->flags |= impl->is_contiguous() ? DCP_TENSOR_CONTIGUOUS : 0;
    view->flags |= may_overlap(impl, view) ? DCP_TENSOR_OVERLAPS : 0;
    view->flags |= DCP_TENSOR_STRIDED; /* last: what it promises is filled */
}

/* Elements from the storage's start to behind the last one, or false when that overflows. */
bool
extent_of(const c10::TensorImpl *impl, const struct dcp_tensor_view *view, uint64_t *ret_elements)
{
    uint64_t end = static_cast<uint64_t>(impl->storage_offset()) + 1;
    for (uint32_t i = 0; i < view->ndim; i++) {
        uint64_t step;
        if (dcp_mul_overflows_u64(static_cast<uint64_t>(view->sizes[i] - 1),
                                  static_cast<uint64_t>(view->strides[i]), &step) ||
            dcp_add_overflows_u64(end, step, &end)) {
            return false;
        }
    }
    *ret_elements = end;
    return true;
}

/* A storage may be empty (meta, fake, wrappers) or shorter than the tensor (resized below it). */
void
fill_memory(const c10::TensorImpl *impl, struct dcp_tensor_view *view)
{
    if (!(view->flags & DCP_TENSOR_STRIDED) || !impl->has_storage()) {
        return;
    }
    const c10::Storage &storage = impl->unsafe_storage();
    view->storage_bytes = storage.nbytes();
    view->flags |= impl->numel() == 0 ? DCP_TENSOR_HAS_MEMORY : 0;
    const auto *base = static_cast<const uint8_t *>(storage.data());
    view->storage = const_cast<uint8_t *>(base);
    if (impl->numel() == 0) {
        return;
    }
    uint64_t end, end_bytes;
    if (base == nullptr || !extent_of(impl, view, &end) ||
        dcp_mul_overflows_u64(end, view->item_bytes, &end_bytes) ||
        end_bytes > view->storage_bytes) {
        return;
    }
    view->data = const_cast<uint8_t *>(base) +
                 static_cast<uint64_t>(impl->storage_offset()) * view->item_bytes;
    view->flags |= DCP_TENSOR_HAS_MEMORY;
}

/* A wrapper that answers by Python code may also leave a Python error behind. */
template <typename Fill>
void
fill_or_leave(Fill fill, const c10::TensorImpl *impl, struct dcp_tensor_view *view) noexcept
{
    try {
        fill(impl, view);
    } catch (...) {
        PyErr_Clear();
    }
}

enum dcp_tensor_class
class_of(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    if (reinterpret_cast<PyObject *>(type) == THPVariableClass ||
        reinterpret_cast<PyObject *>(type) == ParameterClass) {
        return DCP_PLAIN_TENSOR;
    }
    if (PyType_IsSubtype(type, reinterpret_cast<PyTypeObject *>(THPVariableClass))) {
        return DCP_TENSOR_SUBCLASS;
    }
    return DCP_NOT_A_TENSOR;
}

} // namespace

int
dcp_bridge::tensor_view(void *object, struct dcp_tensor_view *ret) noexcept
{
    auto *self = static_cast<PyObject *>(object);
    enum dcp_tensor_class tensor_class = class_of(self);
    if (tensor_class == DCP_NOT_A_TENSOR) {
        return DCP_NOT_A_TENSOR;
    }
    const at::TensorBase &tensor = reinterpret_cast<THPVariable *>(self)->cdata;
    if (!tensor.defined()) {
        return DCP_NOT_A_TENSOR;
    }
    const c10::TensorImpl *impl = tensor.unsafeGetTensorImpl();
    *ret = {};
    fill_or_leave(fill_shape, impl, ret);
    fill_or_leave(fill_memory, impl, ret);
    return tensor_class;
}

uint8_t *
dcp_bridge::tensor_mutable_data(void *object) noexcept
{
    struct dcp_tensor_view view;
    if (tensor_view(object, &view) == DCP_NOT_A_TENSOR || view.data == nullptr) {
        return nullptr;
    }
    auto *impl = reinterpret_cast<THPVariable *>(object)->cdata.unsafeGetTensorImpl();
    try {
        auto *base = static_cast<uint8_t *>(impl->unsafe_storage().mutable_data());
        return base + static_cast<uint64_t>(impl->storage_offset()) * view.item_bytes;
    } catch (...) {
        PyErr_Clear();
        return nullptr;
    }
}

/* The calls of ksort_cuda.h: arguments become jobs, jobs are launched phase after phase. Nothing here allocates, locks
 * or synchronizes. */
#pragma GCC visibility push(default)
#include "ksort_cuda.h"
#pragma GCC visibility pop

#include <atomic>
#include <cmath>

#include "common/check.cuh"
#include "common/head_dim.cuh"
#include "common/phases.cuh"
#include "common/structs.cuh"

namespace {

constexpr size_t WORKSPACE_ALIGNMENT = 256; /* bytes; of the workspace and of each of its parts */

/* Never launched: whether the device has code for it tells whether it has code for the others. */
__global__ void probe_kernel() {}

ksort_status status_of(cudaError_t error)
{
    return error == cudaSuccess ? KSORT_OK : (ksort_status)KSORT_ERR_CUDA;
}

/* Multiprocessors of the current device, asked for once a device: threads that ask at the same time store the same. */
cudaError_t multiprocessors(int *n)
{
    constexpr int N_PLACES = 64;
    static std::atomic<int> known[N_PLACES];
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess)
        return error;
    *n = device < N_PLACES ? known[device].load(std::memory_order_relaxed) : 0;
    if (*n)
        return cudaSuccess;
    error = cudaDeviceGetAttribute(n, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess && device < N_PLACES)
        known[device].store(*n, std::memory_order_relaxed);
    return error;
}

ksort_status check_pack_caches(const ksort_cuda_pack_args &args, pack_job *job)
{
    if (!args.k && !args.v)
        return KSORT_ERR_ARGUMENT;
    ksort_status status = KSORT_OK;
    if (args.k)
        status = check_k_cache(args.k, memory::needed, &job->k);
    if (status == KSORT_OK && args.v)
        status = check_v_cache(args.v, memory::needed, &job->v);
    if (status == KSORT_OK && args.k && args.v)
        status = check_pair(job->k, job->v);
    if (status == KSORT_OK && args.k)
        status = check_transform(args.k_transform, job->k, &job->k_transform);
    if (status == KSORT_OK && args.v)
        status = check_transform(args.v_transform, job->v, &job->v_transform);
    return status;
}

ksort_status check_pack_tokens(const ksort_cuda_pack_args &args, const device_cache &cache, pack_job *job)
{
    ksort_status status = check_tokens(args.tokens, cache, memory::needed, &job->tokens);
    if (status == KSORT_OK)
        status = check_rope(args.rope, job->tokens, memory::needed, &job->rope);
    if (status == KSORT_OK)
        status = check_rows(job->tokens, args.x_type, args.token_stride, args.context_stride,
                            (size_t)cache.pages.n_kv_heads * cache.layout.head_dim);
    if (status == KSORT_OK && args.k)
        status = check_data(args.k_x);
    if (status == KSORT_OK && args.v)
        status = check_data(args.v_x);
    return status;
}

ksort_status prepare_pack(const ksort_cuda_pack_args *from, pack_job *job)
{
    ksort_cuda_pack_args args;
    ksort_status status = read_struct(from, &args);
    if (status == KSORT_OK)
        status = check_pack_caches(args, job);
    if (status == KSORT_OK)
        status = check_pack_tokens(args, args.k ? job->k : job->v, job);
    if (status != KSORT_OK)
        return status;
    job->has_k = args.k, job->has_v = args.v;
    job->has_k_transform = args.k_transform, job->has_v_transform = args.v_transform;
    job->k_x = args.k_x, job->v_x = args.v_x;
    job->token_stride = args.token_stride, job->context_stride = args.context_stride;
    job->x_type = args.x_type;
    return KSORT_OK;
}

/* Everything but data: caches, tokens, tables, counts, strides. */
ksort_status check_attend(const ksort_cuda_attend_args &args, memory memory, attend_job *job)
{
    ksort_status status = check_k_cache(args.k, memory, &job->k);
    if (status == KSORT_OK)
        status = check_v_cache(args.v, memory, &job->v);
    if (status == KSORT_OK)
        status = check_pair(job->k, job->v);
    if (status == KSORT_OK)
        status = check_transform(args.k_transform, job->k, &job->k_transform);
    if (status == KSORT_OK)
        status = check_transform(args.v_transform, job->v, &job->v_transform);
    if (status == KSORT_OK)
        status = check_tokens(args.tokens, job->k, memory, &job->tokens);
    if (status == KSORT_OK)
        status = check_rope(args.rope, job->tokens, memory, &job->rope);
    if (status != KSORT_OK)
        return status;
    if (args.n_heads == 0)
        return KSORT_ERR_ARGUMENT;
    if (args.n_heads % job->k.pages.n_kv_heads)
        return KSORT_ERR_HEADS;
    size_t row_elements = (size_t)args.n_heads * job->k.layout.head_dim;
    status = check_rows(job->tokens, args.x_type, args.q_token_stride, args.q_context_stride, row_elements);
    if (status == KSORT_OK)
        status = check_rows(job->tokens, args.x_type, args.out_token_stride, args.out_context_stride, row_elements);
    return status;
}

/* Rows are counted in 31 bits; slots within max_slots are within the pages of both caches. */
bool sizes_fit(const ksort_cuda_attend_args &args, const attend_job &job)
{
    size_t max_heads = INT32_MAX / job.tokens.n_contexts / job.tokens.n_tokens;
    bool slots_fit = args.max_slots && args.max_slots <= n_slots(job.k.pages) && args.max_slots <= n_slots(job.v.pages);
    return args.n_heads <= max_heads && slots_fit && std::isfinite(args.scale);
}

void fill_attend(const ksort_cuda_attend_args &args, attend_job *job)
{
    job->has_v_transform = args.v_transform;
    job->q = args.q, job->out = args.out;
    job->q_token_stride = args.q_token_stride, job->q_context_stride = args.q_context_stride;
    job->out_token_stride = args.out_token_stride, job->out_context_stride = args.out_context_stride;
    job->x_type = args.x_type;
    job->n_heads = args.n_heads, job->group = args.n_heads / job->k.pages.n_kv_heads;
    job->window = args.window, job->max_slots = args.max_slots;
    job->scale = args.scale;
    job->query_stride = (4 * job->k.layout.n_quads + 31) / 32 * 32;
}

bool is_decode(const attend_job &job)
{
    return job.tokens.n_tokens == 1;
}

/* Gives the parts of the workspace their places, and returns its bytes:
 *
 *     decode: | mantissas | exponents | partials |      prompt: | values | softmax of exact rows |
 *
 * and with exact rows | exact queries | at the end;
 *
 * each begins at a multiple of WORKSPACE_ALIGNMENT.
 */
size_t place_workspace(size_t n_rows, void *workspace, attend_job *job)
{
    size_t bytes = 0;
    auto place = [&bytes, workspace](size_t part_bytes) {
        size_t at = bytes;
        bytes += (part_bytes + WORKSPACE_ALIGNMENT - 1) / WORKSPACE_ALIGNMENT * WORKSPACE_ALIGNMENT;
        return workspace ? static_cast<uint8_t *>(workspace) + at : nullptr;
    };
    if (is_decode(*job)) {
        job->mantissas = (int8_t *)place(n_rows * job->query_stride);
        job->exponents = place(n_rows * MAX_BLOCKS);
        job->partials = (float *)place(decode_partial_floats(*job) * sizeof *job->partials);
    } else {
        job->values = (__nv_bfloat16 *)place(n_rows * job->k.layout.head_dim * sizeof *job->values);
        if (has_exact(job->k))
            job->exact_rows = (exact_softmax *)place(n_rows * sizeof *job->exact_rows);
    }
    if (has_exact(job->k))
        job->exact_queries = (float *)place(n_rows * job->k.layout.head_dim * sizeof *job->exact_queries);
    return bytes;
}

/* Checks the arguments and makes the job; *workspace_bytes becomes what it needs. */
ksort_status prepare_attend(const ksort_cuda_attend_args &args, memory memory, attend_job *job, size_t *workspace_bytes)
{
    ksort_status status = check_attend(args, memory, job);
    if (status != KSORT_OK)
        return status;
    if (!sizes_fit(args, *job))
        return KSORT_ERR_ARGUMENT;
    status = check_exact_pair(job->k, job->v, job->tokens.n_tokens, args.max_slots);
    if (status != KSORT_OK)
        return status;
    fill_attend(args, job);
    if (is_decode(*job)) {
        int n_multiprocessors;
        if (multiprocessors(&n_multiprocessors) != cudaSuccess)
            return (ksort_status)KSORT_ERR_CUDA;
        job->n_splits = decode_splits(*job, n_multiprocessors);
    }
    const size_t n_rows = (size_t)job->tokens.n_contexts * job->tokens.n_tokens * job->n_heads;
    *workspace_bytes = place_workspace(n_rows, args.workspace, job);
    return KSORT_OK;
}

ksort_status check_attend_data(const ksort_cuda_attend_args &args, size_t workspace_bytes)
{
    ksort_status status = check_data(args.q);
    if (status == KSORT_OK)
        status = check_data(args.out);
    if (status != KSORT_OK)
        return status;
    if (!args.workspace)
        return KSORT_ERR_ARGUMENT;
    if (!is_aligned(args.workspace, WORKSPACE_ALIGNMENT))
        return KSORT_ERR_ALIGNMENT;
    return args.workspace_bytes < workspace_bytes ? KSORT_ERR_WORKSPACE : KSORT_OK;
}

template <int HEAD_DIM>
cudaError_t launch_attend(const attend_job &job, cudaStream_t stream)
{
    cudaError_t error = launch_prepare_queries<HEAD_DIM>(job, stream);
    if (error != cudaSuccess)
        return error;
    if (!is_decode(job)) {
        if (has_exact(job.k))
            error = launch_prompt_exact<HEAD_DIM>(job, stream);
        return error == cudaSuccess ? launch_prompt<HEAD_DIM>(job, stream) : error;
    }
    error = launch_decode<HEAD_DIM>(job, stream);
    return error == cudaSuccess ? launch_merge<HEAD_DIM>(job, stream) : error;
}

} // namespace

uint32_t ksort_cuda_abi_version(void)
{
    return KSORT_CUDA_ABI_VERSION;
}

ksort_status ksort_cuda_device_status(void)
{
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (error != cudaSuccess)
        cudaGetLastError(); /* cleared here: not seen again by the next call that looks */
    return status_of(error);
}

ksort_status ksort_cuda_pack(const ksort_cuda_pack_args *args, void *stream)
{
    pack_job job = {};
    ksort_status status = prepare_pack(args, &job);
    if (status != KSORT_OK)
        return status;
    const uint32_t head_dim = job.has_k ? job.k.layout.head_dim : job.v.layout.head_dim;
    return status_of(with_head_dim(head_dim, cudaErrorInvalidValue, [&](auto known_head_dim) {
        cudaError_t error = launch_pack<known_head_dim>(job, (cudaStream_t)stream);
        const bool goes_on = error == cudaSuccess && (has_exact(job.k) || has_exact(job.v));
        return goes_on ? launch_pack_exact<known_head_dim>(job, (cudaStream_t)stream) : error;
    }));
}

ksort_status ksort_cuda_attend_workspace_bytes(const ksort_cuda_attend_args *args, size_t *bytes)
{
    ksort_cuda_attend_args read;
    attend_job job = {};
    size_t workspace_bytes;
    ksort_status status = bytes ? read_struct(args, &read) : KSORT_ERR_ARGUMENT;
    if (status == KSORT_OK)
        status = prepare_attend(read, memory::aside, &job, &workspace_bytes);
    if (status == KSORT_OK)
        *bytes = workspace_bytes;
    return status;
}

ksort_status ksort_cuda_attend(const ksort_cuda_attend_args *args, void *stream)
{
    ksort_cuda_attend_args read;
    attend_job job = {};
    size_t workspace_bytes;
    ksort_status status = read_struct(args, &read);
    if (status == KSORT_OK)
        status = prepare_attend(read, memory::needed, &job, &workspace_bytes);
    if (status == KSORT_OK)
        status = check_attend_data(read, workspace_bytes);
    if (status != KSORT_OK)
        return status;
    return status_of(with_head_dim(job.k.layout.head_dim, cudaErrorInvalidValue, [&](auto known_head_dim) {
        return launch_attend<known_head_dim>(job, (cudaStream_t)stream);
    }));
}

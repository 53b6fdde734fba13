"""Names, families, and the tables of a trace, on names and events as the libraries write them."""

from __future__ import annotations

import math

import pytest

from speedlab.measure import kernels
from speedlab.measure.kernels import FAMILIES, family_of, reading
from speedlab.measure.torch_trace import Span, intersection, length, merged, self_times, spans_of

FAMILY_OF = {
    "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn": "GEMM",
    "void cutlass::Kernel<cutlass_80_tensorop_f16_s16816gemm_relu_f16_256x64_32x4_nn_align8>(Params)": "GEMM",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "GEMM",
    "void cublasLt::splitKreduce_kernel<32, 16, int, __half, __half, float>": "GEMM",
    "ampere_sgemm_128x64_tn": "GEMM",
    "aten::addmm": "GEMM",
    "aten::baddbmm": "GEMM",
    "fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_softmax": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128": "attention",
    "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x32_stage4": "convolution",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_128x64_64x3_nhwc>": "convolution",
    "aten::mkldnn_convolution": "convolution",
    "aten::cudnn_convolution": "convolution",
    "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>": "normalisation",
    "void at::native::vectorized_layer_norm_kernel<c10::Half, float>": "normalisation",
    "aten::native_group_norm": "normalisation",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>": "element-wise",
    "aten::silu": "element-wise",
    "aten::add_": "element-wise",
    "triton_poi_fused_add_convolution_silu_7": "element-wise",
    "triton_red_fused_native_group_norm_3": "normalisation",
    "triton_per_fused__softmax_2": "attention",
    "triton_tem_fused_addmm_5": "GEMM",
    "triton_poi_fused__to_copy_0": "copy",
    "Memcpy HtoD (Pageable -> Device)": "copy",
    "Memset (Device)": "copy",
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float>": "copy",
    "void cask__5x_cudnn::computeOffsetsKernel_convertTensor<half>": "copy",
    "aten::copy_": "copy",
    "aten::cat": "copy",
    "aten::as_strided": "other",
    "aten::empty": "other",
    "something_new": "other",
}


@pytest.mark.parametrize(("name", "family"), FAMILY_OF.items())
def test_the_family_of_a_name(name, family):
    assert family_of(name) == family


def test_every_family_has_a_plain_line():
    assert set(FAMILY_OF.values()) == set(FAMILIES)
    assert all(len(text) > 20 for text in FAMILIES.values())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn",
            ("Ampere", "fp16 numbers on tensor cores, 16x8x16 at a time, added up in fp32", "tiles of 128x128",
             "5 tiles in flight, 32 deep", "the first input transposed"),
        ),
        ("turing_h1688gemm_128x64_nn", ("Turing", "16x8x8 at a time, added up in fp16", "neither input transposed")),
        ("volta_h884gemm_64x64_ldg8_nt", ("Volta", "8x8x4", "the second input transposed")),
        (
            "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x64_32x4_tn_align8",
            ("CUTLASS", "Ampere (compute capability 8.0)", "bf16 numbers on tensor cores", "tiles of 256x64",
             "4 tiles in flight, 32 deep"),
        ),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80", ("memory-efficient attention", "8.0", "fp16", "64x64")),
        ("ampere_sgemm_128x64_tn", ("without tensor cores", "Ampere", "fp32 numbers", "128x64")),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", ("cuBLAS", "tiles of 128x256")),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", ("Hopper (compute capability 9.0)", "bf16")),
    ],
)  # fmt: skip
def test_a_name_is_read_in_words(name, words):
    text = reading(name)
    assert text is not None
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["aten::addmm", "something_new", "Memcpy DtoD (Device -> Device)"])
def test_nothing_is_said_where_nothing_is_known(name):
    assert reading(name) is None


def test_intervals():
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length(merged([(0, 2), (1, 3)])) == 3
    assert intersection([(0, 4), (6, 9)], [(1, 2), (3, 7), (8, 20)]) == [(1, 2), (3, 4), (6, 7), (8, 9)]
    assert merged([]) == []


def test_self_time_is_what_children_leave():
    def op(name, start, duration, thread=1):
        return Span("cpu_op", name, start, duration, (1, thread))

    spans = [op("a", 0, 10), op("b", 1, 4), op("c", 2, 1), op("d", 6, 3), op("other thread", 0, 10, thread=2)]
    assert self_times(spans) == [3, 3, 1, 3, 10]


def event(category, name, start, duration, tid=1, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 0, "tid": tid, "args": args}


def gpu_trace():
    """Two kernels, a copy half hidden behind the second, a wait; the range is shorter than the GPU's work."""
    return {
        "traceEvents": [
            event("user_annotation", "sl/sample", 1000, 100),
            event("gpu_user_annotation", "sl/sample", 1010, 120),
            event("cpu_op", "aten::mm", 1001, 8),
            event("cuda_runtime", "cudaLaunchKernel", 1002, 4),
            event("cuda_runtime", "cudaLaunchKernel", 1012, 2),
            event("cuda_driver", "cuLaunchKernel", 1015, 2),
            event("cuda_runtime", "cudaStreamSynchronize", 1050, 40),
            event("kernel", "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn", 1010, 30, tid=7),
            event("kernel", "void at::native::vectorized_elementwise_kernel<4, add>", 1040, 20, tid=7),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 1050, 20, tid=8, bytes=4096),
            event("gpu_memset", "Memset (Device)", 1090, 10, tid=7, bytes=128),
            event("kernel", "late", 1115, 10, tid=7),
            event("cuda_runtime", "cudaDeviceSynchronize", 1105, 50),
            {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 1010, "pid": 0, "tid": 7},
            {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        ]
    }


def test_a_gpus_trace():
    report = kernels.analyse(spans_of(gpu_trace()))
    assert report.unit == "kernels"
    assert [(row["family"], row["calls"], row["ms"]) for row in report.rows] == [
        ("GEMM", 1, 0.03), ("copy", 1, 0.02), ("element-wise", 1, 0.02), ("copy", 1, 0.01), ("other", 1, 0.01),
    ]  # fmt: skip
    assert math.isclose(sum(row["share"] for row in report.rows), 100.0, abs_tol=1e-3)
    assert math.isclose(sum(family["share"] for family in report.families), 100.0, abs_tol=1e-3)
    assert all(row["name"] != "sl/sample" for row in report.rows), "a range is no kernel"
    # From 1000 to the last kernel's end at 1125: busy 1010-1070, 1090-1100 and 1115-1125.
    assert report.device is not None
    assert report.device["busy_ms"] == 0.08
    assert report.device["busy_share"] == pytest.approx(100 * 80 / 125)
    assert report.device["host_wait_ms"] == 0.04, "the wait after the range is the profiler's own"
    assert report.device["copies"]["ms"] == 0.03
    assert report.device["copies"]["overlap_ms"] == 0.01
    assert report.device["copies"]["overlap_share"] == pytest.approx(100 / 3, abs=1e-3)
    assert report.device["copies"]["kinds"] == [
        {"kind": "DtoH", "calls": 1, "ms": 0.02, "bytes": 4096}, {"kind": "memset", "calls": 1, "ms": 0.01,
                                                                  "bytes": 128}]  # fmt: skip
    assert [(row["name"], row["calls"], row["ms"]) for row in report.runtime] == [
        ("cudaStreamSynchronize", 1, 0.04), ("cudaLaunchKernel", 2, 0.006), ("cuLaunchKernel", 1, 0.002)]  # fmt: skip
    assert report.between_ms is None


def test_a_cpus_trace():
    trace = {
        "traceEvents": [
            event("user_annotation", "sl/sample", 0, 100),
            event("user_annotation", "sl/step", 5, 90),
            event("cpu_op", "aten::linear", 10, 40),
            event("cpu_op", "aten::addmm", 12, 36),
            event("cpu_op", "aten::silu", 60, 10),
            event("cpu_op", "## Call CompiledFxGraph fabc123 ##", 80, 6),
        ]
    }
    report = kernels.analyse(spans_of(trace))
    assert report.unit == "operators"
    assert report.device is None and report.runtime == ()
    assert [(row["name"], row["ms"]) for row in report.rows] == [
        ("aten::addmm", 0.036), ("aten::silu", 0.01), ("compiled graph (torch.compile)", 0.006),
        ("aten::linear", 0.004),
    ]  # fmt: skip
    assert report.total_ms == 0.056
    assert report.between_ms == 0.044, "total and what lies between add up to the range"
    assert report.wall_ms == 0.1


def test_an_empty_trace_gives_empty_tables():
    report = kernels.analyse([])
    assert report.rows == () and report.families == () and report.total_ms == 0.0

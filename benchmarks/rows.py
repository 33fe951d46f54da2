"""All rows, in the order of `docs/performance.md`."""

from benchmarks import gpu, pairing, pipeline, saliency, scaling, startup, steps

CPU_ROWS = (pairing.ROW, steps.ROW, saliency.ROW, startup.ROW, pipeline.ROW, scaling.ROW)
GPU_ROW = gpu.ROW

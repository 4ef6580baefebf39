"""Two CUDA devices on a machine that has none, and a NCCL between them: `make fake-gpu`.

Their memory is the host's and every operation runs on the CPU, but tensors of two devices may not
meet, a collective takes none of the CPU, new memory is full of NaN, and the current one of the two
need not be a tensor's. What would raise on a GPU for being in the wrong place raises here, and what
its host would wait for is seen. There is no CUDA code, no order of streams and no figure to be had
of it.

    device.cpp        the device: an allocator, a guard, and a fallback that runs all on the CPU
    collectives.cpp   a process group backend that hands such tensors to gloo
    build.py          compiles both, where they changed (a C++ compiler, a minute)
    install.py        `torch.cuda` over it, for a process that imports it before torch
    plugin.py         pytest's option `-p tests.fake_gpu.plugin` does so; kernels interpreted or not
    checks.py         what is run so: every model type, models over two devices, two ranks, waits
    waits.py          where a step's host waits for its device
    graphs.py         a step as a CUDA graph: operators that run again without their Python
    dense.py          attention that such a graph can hold
    ranks.py          the work of a rank
"""

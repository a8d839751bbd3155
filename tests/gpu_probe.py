"""What tests/gpu_day.sh asks of a GPU beside the project's own commands.

    python tests/gpu_probe.py machine         # rates: matrix products, copies, launches, disk
    python tests/gpu_probe.py attention       # backends: time, error, what dropout drops
    python tests/gpu_probe.py loss            # error of the chunked loss at full size
    python tests/gpu_probe.py step config/babyllama.py --batch_size=8    # a JSON line: one step's time
    python tests/gpu_probe.py table OUT       # the runs in a folder
"""
import dataclasses
import glob
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import distill  # noqa: E402
import train  # noqa: E402
from distill import DistillConfig, Teacher  # noqa: E402
from lib.chunked_loss import chunked_loss  # noqa: E402
from lib.configurator import configure, launch  # noqa: E402
from lib.files import flush_to_disk, read_json  # noqa: E402
from lib.machine import Machine  # noqa: E402
from lib.runs import Keeper  # noqa: E402
from lib.shards import read_meta  # noqa: E402
from model import LanguageModel, ModelConfig  # noqa: E402
from tools import bench, plan  # noqa: E402

WARMUP = 10  # steps
for _layer in (torch.nn.Linear, torch.nn.Embedding):
    _layer.reset_parameters = lambda self: None  # init_weights draws a billion weights again
randn = partial(torch.randn, device="cuda")


def main(argv):
    dict(machine=machine, attention=attention, loss=loss, step=step, table=table)[argv[0]](*argv[1:])


def seconds(f, n=20):
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(n):
        f()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / n


def machine():
    print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), os.cpu_count(), "cores")
    for m, n, k in ((8192, 8192, 8192), (4096, 512, 512), (4096, 16000, 512), (4096, 6144, 1536)):
        x, w = (randn(rows, k, dtype=torch.bfloat16) for rows in (m, n))
        s = seconds(lambda: x @ w.T)
        print(f"bfloat16 {m} x {n} x {k}: {1e6 * s:.1f} us, {2 * m * n * k / s / 1e12:.0f} TFLOP/s")
    a = randn(2 ** 28)
    print(f"copy: {2 * a.nbytes / seconds(a.clone) / 1e12:.2f} TB/s")
    one = torch.zeros(1, device="cuda")
    print(f"a tiny kernel: {1e6 * seconds(lambda: one.add_(1), 5000):.1f} us each in a row")
    begin = time.perf_counter()
    host = a.cpu()
    print(f"to pageable memory: {a.nbytes / (time.perf_counter() - begin) / 1e9:.1f} GB/s")
    begin = time.perf_counter()
    hashlib.sha256(host.numpy()).digest()
    print(f"sha256: {a.nbytes / (time.perf_counter() - begin) / 1e9:.2f} GB/s")
    with tempfile.NamedTemporaryFile(dir=".") as f:
        begin = time.perf_counter()
        host.numpy().tofile(f.name)
        flush_to_disk(f.name)
        print(f"disk, with fsync: {a.nbytes / (time.perf_counter() - begin) / 1e9:.2f} GB/s")


SHAPES = {  # (B, H, H_kv, T, D), dropout
    "GPT2-705M": ((32, 16, 16, 128, 96), 0.1),
    "Llama-58M": ((32, 8, 8, 128, 64), 0.0),
    "BabyLlama-2": ((32, 15, 5, 128, 64), 0.0),
}


def attention():
    for name, (shape, p) in SHAPES.items():
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    time_and_error(name, backend, p, *shape)
            except RuntimeError as e:
                print(f"{name}, {backend.name}: {str(e).splitlines()[0][:120]}")


def time_and_error(name, backend, p, B, H, H_kv, T, D):
    """What dropout does shows where queries are 0 and values unit vectors: the output is the weights."""
    q, k, v = (randn(B, h, T, D, dtype=torch.bfloat16, requires_grad=True) for h in (H, H_kv, H_kv))
    attend = partial(F.scaled_dot_product_attention, enable_gqa=H != H_kv, is_causal=True)
    y = attend(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        exact = attend(*(x.detach().double() for x in (q, k, v)))
    s = seconds(lambda: torch.autograd.grad(attend(q, k, v, dropout_p=p).sum(), (q, k, v)))
    zeros, unit = torch.zeros_like(q[:, :, :D]), torch.eye(D, device="cuda", dtype=torch.bfloat16)
    weights = F.scaled_dot_product_attention(zeros, zeros, unit.expand_as(zeros).contiguous(), dropout_p=p)
    kept = weights[weights > 0].float().mean() * D
    print(f"{name}, {backend.name}: {1e6 * s:.0f} us, error {(y - exact).norm() / exact.norm():.1e}; dropped "
          f"{(weights == 0).float().mean():.4f} for {p}, kept weigh {kept:.4f} for {1 / (1 - p):.4f}")


def loss():
    """Loss, dh and dw of Baby Llama's size, against the plain formula in float32."""
    torch.manual_seed(0)
    h, w, y = randn(2048, 512), 0.05 * randn(16000, 512), torch.randint(16000, (2048,), device="cuda")
    teacher = LanguageModel(ModelConfig(vocab_size=16000, n_layer=1, n_embd=1536)).cuda()
    states, exact = randn(2048, 1536), None
    for dtype, chunk, compiled in ((torch.float32, 0, False), (torch.float32, 512, True),
                                   (torch.bfloat16, 0, False), (torch.bfloat16, 512, True)):
        head = torch.nn.Linear(512, 16000, bias=False, device="cuda")
        head.weight.data.copy_(w)
        x = h.clone().requires_grad_()
        gpu = Machine(torch.device("cuda"))
        formula = distill.formula_of(DistillConfig(), gpu, [Teacher(teacher, dtype)])
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value, _ = chunked_loss(formula, x[None], head, y[None], states.to(dtype)[None], chunk=chunk,
                                    compiled=compiled)
        value.backward()
        got = [t.detach() for t in (value, x.grad, head.weight.grad)]
        exact = exact or got
        errors = ", ".join(f"{(a - b).norm() / b.norm():.1e}" for a, b in zip(got, exact))
        print(f"{dtype}, chunk {chunk}, compiled {compiled}: {value:.5f}; errors of loss, dh, dw: {errors}")


def step(config, *flags):
    """train.py or distill.py without checkpoints; teachers are random models of the configured sizes."""
    cfg = configure(DistillConfig, [config, *flags])
    kept = os.path.join(os.environ.get("TMPDIR", "/tmp"), "probe_teachers")
    others = plan.teacher_configs(config, cfg.teachers)
    cfg.teachers = tuple(random_teacher(kept, cfg, other) for other in others)
    cfg.out_dir, cfg.overwrite, cfg.log_interval, cfg.eval_chunks = tempfile.mkdtemp(), True, 5, 64
    cfg.max_iters, cfg.eval_interval = cfg.max_iters or 60, 10 ** 9
    host, begin, after_step = [], time.perf_counter(), Keeper.after_step

    def timed(keeper, step, *args):
        """What the host takes for a step when it begins with the GPU idle; in the last ten."""
        nonlocal begin
        host.append(time.perf_counter() - begin)
        if step > cfg.max_iters - 10:
            torch.cuda.synchronize()
        after_step(keeper, step, *args)
        begin = time.perf_counter()
    Keeper.after_step, Keeper.save, Keeper.finish = timed, lambda *args: None, lambda *args: None
    (distill if cfg.teachers else train).main(cfg)
    with open(os.path.join(cfg.out_dir, "metrics.jsonl")) as f:
        records = [r for r in map(json.loads, f) if WARMUP < r["step"] <= cfg.max_iters - 10]
    rate = statistics.median(r["tokens_per_s"] for r in records)
    print(json.dumps(dict(
        step=os.path.basename(config), flags=flags, tokens_per_s=rate,
        ms=round(1e3 * cfg.batch_size * cfg.seq_len / rate, 2),
        host_ms=round(1e3 * statistics.median(host[-9:]), 2),
        reserved_gib=round(torch.cuda.max_memory_reserved() / 2 ** 30, 2), loss=records[-1]["loss"])))


def random_teacher(folder, cfg, other):
    """The folder of a checkpoint of the sizes of `other`, for cfg's data."""
    other.vocab_size = read_meta(cfg.data_dir)["vocab_size"]
    sizes = train.model_config(other)
    path = os.path.join(folder, "_".join(map(str, dataclasses.astuple(sizes))))
    if not os.path.isfile(os.path.join(path, "last.json")):
        bench.write_teacher(path, sizes, cfg.data_dir)
    return path


def table(out):
    """Of runs and of the scores in blimp_<run>.json; where the CPU scored too, how many decisions differ."""
    print("\n| run | step | tokens/s | best val_ce | BLiMP | supplement |\n|---|---:|---:|---:|---:|---:|")
    names = [os.path.basename(os.path.dirname(path)) for path in sorted(glob.glob(f"{out}/*/metrics.jsonl"))]
    names += ["ensemble"] * os.path.exists(f"{out}/blimp_ensemble.json")
    for name in names:
        log = read_lines(f"{out}/{name}/metrics.jsonl")
        rates, val_ce = ([r[key] for r in log if key in r] for key in ("tokens_per_s", "val_ce"))
        scores = folders(f"{out}/blimp_{name}.json")
        cells = [f"{100 * scores[f]['accuracy']:.1f}" if f in scores else ""
                 for f in ("blimp_filtered", "supplement_filtered")]
        print(f"| {name} | {log[-1]['step'] if log else ''} | {statistics.median(rates or [0]):,.0f} "
              f"| {min(val_ce, default=math.nan):.4f} | {' | '.join(cells)} |")
    ours, cpu = ([c for task in folders(f"{out}/blimp_{name}.json").get(
        "supplement_filtered", dict(tasks={}))["tasks"].values() for c in task["right"]]
        for name in ("distilled_44m", "cpu"))
    if ours and cpu:
        differ = sum(a != b for a, b in zip(ours, cpu, strict=True))
        print(f"\nsupplement: {differ} of {len(cpu)} decisions differ from the CPU's")


def read_lines(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return list(map(json.loads, f))


def folders(path):
    return read_json(path)["folders"] if os.path.exists(path) else {}


if __name__ == "__main__":
    launch(main)

# config/study/switch.py as far as a CPU core gets in an hour: three seeds of 300 steps of 8 x 128 tokens, four
# layers of width 96.
#   python -m tools.study config/study/switch_cpu.py --seeds=1,2,3
_model = "config/gpt2_10m.py config/cpu.py --n_layer=4 --n_head=4 --n_embd=96 --intermediate_size=384"
runs = [f"dense {_model}", f"1-expert {_model} --n_experts=1"]
runs += [
    f"{n}-experts-{percent} {_model} --n_experts={n} --expert_capacity={percent / 100:g}"
    for percent in (100, 125, 200) for n in (2, 4, 8)]
settings = ["--max_iters=300", "--eval_interval=150", "--eval_chunks=512"]
out_dir = "out/switch_cpu"

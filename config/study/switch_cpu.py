# config/study/switch.py in small, for a CPU: four layers of width 96, 200 steps of 8 x 128 tokens.
#   python -m tools.study config/study/switch_cpu.py --seeds=1,2,3
_model = "config/gpt2_10m.py config/cpu.py --n_layer=4 --n_head=4 --n_embd=96 --intermediate_size=384"
runs = [f"dense {_model}", f"1-expert {_model} --n_experts=1"]
runs += [
    f"{n}-experts-{percent} {_model} --n_experts={n} --expert_capacity={percent / 100:g}"
    for percent in (100, 125, 200) for n in (2, 4, 8)]
settings = ["--max_iters=200", "--eval_interval=200", "--eval_chunks=256"]
out_dir = "out/switch_cpu"

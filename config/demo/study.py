# Recipes side by side on what `make demo` left in demo/: the plain student, and the distilled one with each
# teacher, with both, at other temperatures and weights of CE, and with the published reduction of KL. About a
# minute a run on one CPU core.
#   make demo && python -m tools.study config/demo/study.py --seeds=1,2,3
_distilled = "config/demo/student.py --temperature=1"
_both = f"{_distilled} demo/gpt2 demo/llama"
runs = [
    "plain config/demo/student.py",
    f"gpt2-alone {_distilled} demo/gpt2",
    f"llama-alone {_distilled} demo/llama",
    f"both {_both}",
    f"temperature-2 {_both} --temperature=2",
    f"alpha-0 {_both} --alpha=0",
    f"alpha-09 {_both} --alpha=0.9",
    f"sequence {_both} --kl_reduction=sequence",
    f"plain-as-teacher {_distilled} plain",
]
settings = ["config/demo/demo.py"]
data_dir = "demo/data"
out_dir = "demo/study"
blimp = ["demo/pairs"]

# Self- and reverse-distillation in small, on what `make demo` left in demo/: nine models of three sizes, each
# taught by the three before it. About ten minutes on one CPU core.
#   make demo && python -m tools.study config/demo/chain.py
_small, _medium, _large = (f"--n_embd={c} --intermediate_size={3 * c}" for c in (48, 64, 96))
runs = [
    f"s-0 config/demo/student.py {_small} demo/gpt2 demo/llama",
    f"s-1 config/demo/student.py {_small} s-0",
    f"s-2 config/demo/student.py {_small} s-0 s-1",
    f"m-0 config/demo/student.py {_medium} s-0 s-1 s-2",
    f"m-1 config/demo/student.py {_medium} s-1 s-2 m-0",
    f"m-2 config/demo/student.py {_medium} s-2 m-0 m-1",
    f"l-0 config/demo/student.py {_large} m-0 m-1 m-2",
    f"l-1 config/demo/student.py {_large} m-1 m-2 l-0 --teacher_dtype=float32,float32,int8",
    f"l-2 config/demo/student.py {_large} m-2 l-0 l-1 --teacher_dtype=float32,int8,int8",
]
settings = ["config/demo/demo.py", "--temperature=1"]
data_dir = "demo/data"
out_dir = "demo/chain"
blimp = ["demo/pairs"]

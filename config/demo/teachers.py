# How many teachers and which, on what `make demo` left in demo/: six equal teachers of the larger size that
# differ by seed alone, one to six of them; then a smaller one, one of the student's own size, and a mixed
# four. About twenty minutes a seed on one CPU core.
#   make demo && python -m tools.study config/demo/teachers.py --seeds=1,2,3
_large = [f"large{i}" for i in range(1, 7)]
_widths = {"smaller": 48, "equal": 64, **{name: 96 for name in _large}}
_student = "config/demo/student.py --temperature=1"
runs = ["plain config/demo/student.py"]
runs += [
    f"{name} config/demo/student.py --n_embd={width} --intermediate_size={3 * width} --seed=+{100 * i}"
    for i, (name, width) in enumerate(_widths.items(), 1)]
runs += [f"of-{n}-large {_student} {' '.join(_large[:n])}" for n in (1, 2, 3, 4, 5, 6)]
runs += [
    f"of-smaller {_student} smaller",
    f"of-equal {_student} equal",
    f"of-mixed {_student} smaller equal large1 demo/gpt2",
]
settings = ["config/demo/demo.py"]
data_dir = "demo/data"
out_dir = "demo/teachers"
blimp = ["demo/pairs"]

# Baby Llama's appendix B on what `make demo` left in demo/: one more epoch at a low rate, the same with SAM,
# gradient ascent after training, an ensemble of three models that differ by seed alone. About three minutes a
# seed on one CPU core. Its curriculum: config/curriculum.py.
#   make demo && python -m tools.study config/demo/appendix_b.py --seeds=1,2,3
_student = "config/demo/student.py"
_from_plain = f"{_student} --init_from=plain --warmup_iters=0"
_one_epoch = f"{_from_plain} --max_iters=53 --eval_interval=53 --schedule=linear --learning_rate=1e-4"
runs = [
    f"plain {_student}",
    f"plain-b {_student} --seed=+100",
    f"plain-c {_student} --seed=+200",
    f"one-epoch-more {_one_epoch}",
    f"sam {_one_epoch} --sam_rho=0.05",
    f"ascent {_from_plain} --ascent --batch_size=1 --max_iters=15 --eval_interval=15 --schedule=constant "
    "--learning_rate=5e-5 --weight_decay=0",
    "three ensemble plain plain-b plain-c",
]
settings = ["config/demo/demo.py"]
data_dir = "demo/data"
out_dir = "demo/appendix_b"
blimp = ["demo/pairs"]

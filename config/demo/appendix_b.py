# Baby Llama's appendix B on what `make demo` left in demo/: one more epoch at a low rate, the same with SAM, gradient ascent after training,
# an ensemble of three models that differ by seed alone. About three minutes a seed on one CPU core. Its curriculum: config/curriculum.py.
#   make demo && python -m tools.study config/demo/appendix_b.py --seeds=1,2,3
_more = "config/demo/student.py --init_from=plain --max_iters=53 --eval_interval=53 --warmup_iters=0 --schedule=linear --learning_rate=1e-4"
runs = [
    "plain config/demo/student.py",
    "plain-b config/demo/student.py --seed=+100",
    "plain-c config/demo/student.py --seed=+200",
    f"one-epoch-more {_more}",
    f"sam {_more} --sam_rho=0.05",
    "ascent config/demo/student.py --init_from=plain --ascent --batch_size=1 --max_iters=15 --eval_interval=15 --warmup_iters=0 "
    "--schedule=constant --learning_rate=5e-5 --weight_decay=0",
    "three ensemble plain plain-b plain-c",
]
settings = ["config/demo/demo.py"]
data_dir = "demo/data"
out_dir = "demo/appendix_b"
blimp = ["demo/pairs"]

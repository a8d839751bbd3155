# BabyLlama-2's fine-tuning sweeps (what its table 4 comes from: 1,293 runs, 37 GPU-days): a search for each
# task with the published priors; Bayesian, Hyperband from one epoch on (not for MNLI and QQP), seed 12. A
# run's score is the reported one of its epoch of best F1 (MNLI: of best accuracy).
#   python -m tools.sweep config/glue/sweep.py --out_dir=out/glue_sweep --run="config/glue/babyllama2.py \
#       --ckpt=out/babyllama2 --data=glue_filtered --tasks=cola,sst2,mrpc,qqp,mnli,qnli,rte,boolq,multirc,wsc"
# out/glue_sweep/best.py has then the best per_task line of each task. To fine-tune with it, lay it over
# config/glue/babyllama2.py, which says what is not drawn. The paper rounded what it found (table 4), and ran
# MNLI and QQP for more epochs than the one that was searched (2 and 6).
n_trials = 130  # of each task
not_stopped = ["mnli", "qqp"]
priors = [
    "batch_size int-loguniform 1 32",
    "epochs int-loguniform 1 10",
    "weight_decay lognormal 0 1.5",
    "schedule choice linear cosine constant",
    "warmup_iters int-lognormal 5.7 1",
    # mu and sigma of the natural logarithm
    "cola learning_rate lognormal -9.9 1",
    "sst2 learning_rate lognormal -10.5 1.5",
    "mrpc learning_rate lognormal -9.9 1",
    "qnli learning_rate lognormal -10.5 1.5",
    "qnli warmup_iters int-lognormal 6 1",
    "rte learning_rate lognormal -9.9 1",
    "boolq learning_rate lognormal -9 1.5",
    "boolq warmup_iters int-lognormal 6 1",
    "multirc learning_rate lognormal -9 1.5",
    "multirc warmup_iters int-lognormal 6 1",
    "wsc learning_rate lognormal -14.5 1",
    "wsc epochs int-loguniform 1 32",
]
for _task in ("mnli", "qqp"):
    priors += [f"{_task} learning_rate lognormal -11 1", f"{_task} batch_size choice 1 32",
               f"{_task} epochs choice 1", f"{_task} schedule choice linear",
               f"{_task} warmup_iters choice 500"]

# The recipe of `make demo`, shared by its four runs; sized for two CPU cores and less than a minute a run.
# Little text (2,000 lines) and many passes over it, so that there is something for distillation to do: alone,
# the student overfits.
block_size = 128
seq_len = 64
batch_size = 16
epochs = 1000       # max_iters ends the run
max_iters = 500
learning_rate = 2e-3
warmup_iters = 50
weight_decay = 0.1
eval_interval = 100
eval_chunks = 0
log_interval = 50
compile = "off"     # does not pay at this size

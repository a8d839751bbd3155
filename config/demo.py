# The recipe of `make demo`: everything that its four runs share. Sized for two CPU cores and a minute a run.
vocab_size = 600
block_size = 128
seq_len = 64
batch_size = 32
epochs = 8
learning_rate = 2e-3
warmup_iters = 50
weight_decay = 0.1
eval_interval = 100
eval_chunks = 0
log_interval = 50
dtype = "float32"   # at this size neither bfloat16 nor compiling pays
compile = False

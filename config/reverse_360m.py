# A generation of 360M in config/reverse_distillation.py: 359,973,888 parameters.
arch = "llama"
n_layer = 24
n_head = 8
n_embd = 1024
intermediate_size = 3072

epochs = 10
batch_size = 64
learning_rate = 2.5e-4
warmup_iters = 200
seq_len = 128
seed = 42

alpha = 0.5
temperature = 2.0
kl_reduction = "sequence"  # the published code's; 'token' is the equation as it reads

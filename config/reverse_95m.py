# A generation of 95M in config/reverse_distillation.py: 95,371,008 parameters.
arch = "llama"
n_layer = 10
n_head = 12
n_embd = 768
intermediate_size = 2048

epochs = 10
batch_size = 64
learning_rate = 2.5e-4
warmup_iters = 200
seq_len = 128
seed = 42

alpha = 0.5
temperature = 2.0
kl_reduction = "sequence"  # the published code's; 'token' is the equation as it reads

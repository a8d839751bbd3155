# A generation of 58M in config/reverse_distillation.py: 58,343,936 parameters.
arch = "llama"
n_layer = 16
n_head = 8
n_embd = 512
intermediate_size = 1024

epochs = 10
batch_size = 64
learning_rate = 2.5e-4
warmup_iters = 200
seq_len = 128
seed = 42

alpha = 0.5
temperature = 2.0
kl_reduction = "sequence"  # the published code's; 'token' is the equation as it reads

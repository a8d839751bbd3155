# Llama-95M (self- and reverse-distillation): 95,371,008 parameters. Recipe of that paper, without teachers.
#   torchrun --nproc_per_node=4 train.py config/llama_95m.py
out_dir = "out/llama_95m"

arch = "llama"
n_layer = 10
n_head = 12
n_embd = 768
intermediate_size = 2048

epochs = 10
batch_size = 64
learning_rate = 2.5e-4
warmup_iters = 200
weight_decay = 0.0
seq_len = 128

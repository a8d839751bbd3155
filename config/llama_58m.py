# Llama-58M, the plain twin of Baby Llama (Baby Llama, Table 1 "no distillation"): 58,343,936 parameters.
# Same model and recipe as config/babyllama.py, trained on cross-entropy alone.
#   torchrun --nproc_per_node=4 train.py config/llama_58m.py
out_dir = "out/llama_58m"

arch = "llama"
n_layer = 16
n_head = 8
n_embd = 512
intermediate_size = 1024

epochs = 6
batch_size = 32
learning_rate = 3e-4
warmup_iters = 200
weight_decay = 0.1
seq_len = 128

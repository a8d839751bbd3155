# Llama-16M (Baby Llama, ablations): 16,584,960 parameters. Recipe: the Baby Llama student's, which the paper
# does not state for this model.
#   python train.py config/llama_16m.py --out_dir=out/llama_16m
arch = "llama"
n_layer = 8
n_head = 8
n_embd = 256
intermediate_size = 1024

epochs = 6
batch_size = 32
learning_rate = 3e-4
warmup_iters = 200
weight_decay = 0.1
seq_len = 128

# Llama-20M (Teaching Tiny Minds, section 4): 2 layers of width 384; the paper gives no MLP width, 3072 makes
# 20.5M.
#   python train.py config/tinyminds_llama_20m.py
out_dir = "out/tinyminds_llama_20m"

arch = "llama"
n_layer = 2
n_head = 4
n_embd = 384
intermediate_size = 3072

epochs = 4
batch_size = 128
learning_rate = 3e-4
warmup_iters = 300
weight_decay = 0.0
seq_len = 128

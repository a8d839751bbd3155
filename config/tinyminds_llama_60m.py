# Llama-60M (Teaching Tiny Minds, section 4), teacher of DistilledGPT-44M: 2 layers of width 768. No MLP width
# is given and none of the usual ones makes 60M: 2048 is our choice.
#   python train.py config/tinyminds_llama_60m.py
out_dir = "out/tinyminds_llama_60m"

arch = "llama"
n_layer = 2
n_head = 8
n_embd = 768
intermediate_size = 2048

epochs = 4
batch_size = 128
learning_rate = 3e-4
warmup_iters = 300
weight_decay = 0.0
seq_len = 128

# GPT2-44M (Teaching Tiny Minds, section 4), teacher and plain twin of DistilledGPT-44M. The paper's table
# gives 2 layers of width 768, which with a vocabulary of 16,000 are 26.7M parameters, not 44M.
#   python train.py config/tinyminds_gpt2_44m.py
out_dir = "out/tinyminds_gpt2_44m"

arch = "gpt2"
n_layer = 2
n_head = 8
n_embd = 768
intermediate_size = 3072
tie_weights = True
norm_eps = 1e-5

epochs = 6
batch_size = 128
learning_rate = 7e-4
warmup_iters = 300
weight_decay = 0.0
seq_len = 128

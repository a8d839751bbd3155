# GPT2-18M (Teaching Tiny Minds, section 4). The paper's table gives 2 layers of width 320, which with a
# vocabulary of 16,000 are 7,668,480 parameters, not 18M; the table is built, the count is as printed by
# model.py.
#   python train.py config/tinyminds_gpt2_18m.py
out_dir = "out/tinyminds_gpt2_18m"

arch = "gpt2"
n_layer = 2
n_head = 4
n_embd = 320
intermediate_size = 1280
tie_weights = True
norm_eps = 1e-5

epochs = 6
batch_size = 128
learning_rate = 7e-4
warmup_iters = 300
weight_decay = 0.0
seq_len = 128

# The generator of MaskedAdversarialLlama (Teaching Tiny Minds, section 4.4, "ELECTRA-56M"): a masked
# language model. The paper gives its size alone; 15 layers of width 512 with GPT-2's blocks, 55,609,856
# parameters, the rate of masked tokens and the recipe (GPT2-44M's) are our choice.
#   python train.py config/electra_56m.py
out_dir = "out/electra_56m"

arch = "gpt2"
causal = False
n_layer = 15
n_head = 8
n_embd = 512
intermediate_size = 2048
tie_weights = True
norm_eps = 1e-5

mask_rate = 0.15
epochs = 6
batch_size = 128
learning_rate = 7e-4
warmup_iters = 300
seq_len = 128

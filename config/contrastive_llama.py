# ContrastiveLlama-58M (Teaching Tiny Minds, section 4.3): Baby Llama with 0.39 CE + 0.39 KD + 0.22 N-pair
# loss on hidden states, N = 32. What stands for a text, what an inner product is divided by and the
# projections are our choice (lib/objectives.py). The paper's scores: BLiMP 68.5, supplement 59.3.
#   python distill.py config/contrastive_llama.py      # one process: the 32 sequences must be on one rank
#   python distill.py config/contrastive_llama.py --teachers=out/tinyminds_gpt2_705m,out/tinyminds_llama_360m
# The second has teachers by the paper's own recipe (its Table 1), not Baby Llama's.
# With kl_reduction = "sequence" KL has 512 times the weight per token, and the contrast next to none;
# "token" gives it weight.
out_dir = "out/contrastive_llama"

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

teachers = ["out/gpt2_705m", "out/llama_360m"]
alpha = 0.5
temperature = 2.0
kl_reduction = "sequence"  # the published code's; 'token' is the equation as it reads
contrastive = 0.22  # alpha = 0.5 halves the other 0.78
n_pairs = 32

# MaskedAdversarialLlama-58M (Teaching Tiny Minds, section 4.4): MATE-KD with equal weights for CE, KD and
# KD on rewritten text. The paper leaves open how much is masked, how many steps each side has, and the
# generator's rates: 30%, 10 and 100, the student's. Scores there: BLiMP 65.9, supplement 56.8.
#   python train.py config/electra_56m.py
#   python train.py config/tinyminds_gpt2_44m.py
#   python train.py config/tinyminds_llama_60m.py
#   python distill.py config/masked_adversarial_llama.py
out_dir = "out/masked_adversarial_llama"

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

teachers = ["out/tinyminds_gpt2_44m", "out/tinyminds_llama_60m"]
alpha = 0.5
temperature = 2.0
kl_reduction = "sequence"  # the published code's; 'token' is the equation as it reads
generator = "out/electra_56m"
mask_rate = 0.3
generator_steps = 10
student_steps = 100

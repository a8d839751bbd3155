# The papers' regime, more parameters than words and many epochs, at a size that two CPU cores carry: 200,513
# words (412,868 tokens), models of 1.1 to 2.6 million parameters, 6 or 10 epochs of 16 x 128 tokens. A run
# takes three to seven minutes of one thread (OMP_NUM_THREADS=1), its scoring one.
#   python prepare.py --input_dir=babylm --bos=line --vocab_size=2048 --train_fraction=0.02 \
#       --data_dir=data/million
#   python -m tools.study config/study/million.py --seeds=1,2,3
# Baby Llama has two larger teachers of two kinds, BabyLlama-2 two of the student's own size and more weight
# decay, Tiny Minds two small ones and a GPT-2 as the student. None has dropout (the papers' GPT-2 has 0.1): a
# CPU takes three times as long with it. Rates and decay were chosen on validation loss with seed 11; those of
# `strong` (offsets, alpha, Muon, decay, whether another rate pays: too little) with 11 to 13.
_llama = "config/llama_16m.py --n_layer=4 --n_head=4"
_gpt2 = "config/gpt2_10m.py --n_layer=4 --n_head=4 --micro_batch_size=0 --weight_decay=0.1 --dropout=0"
_small = f"{_gpt2} --n_embd=128 --intermediate_size=512"
_student = f"{_llama} --n_embd=128 --intermediate_size=384"
_large = f"{_llama} --n_embd=192 --intermediate_size=512"
_published = "--kl_reduction=sequence"
_cached = "--teacher_cache=data/million_teachers"  # twice the speed, the same arithmetic; wants fixed chunks
_ten, _offset, _fixed = "--epochs=10", "--random_offset=True", "--random_offset=False"
_adamw = "--optimizer=adamw --weight_decay=0.1"
_teacher, _taught = "config/strong_teacher.py", "config/strong_student.py"
runs = [
    f"plain {_student}",
    f"plain-10-offset {_student} {_ten} {_offset}",
    # Baby Llama
    f"gpt2 {_gpt2} --n_embd=192 --intermediate_size=768",
    f"llama {_large}",
    f"babyllama {_student} {_published} gpt2 llama",
    f"babyllama-10 {_student} {_published} {_ten} {_cached} gpt2 llama",
    f"babyllama-10-offset {_student} {_published} {_ten} {_offset} gpt2 llama",
    # beyond the papers, with each of its parts taken away
    f"strong {_student} {_taught} {_ten} gpt2 llama",
    f"strong-6 {_student} {_taught} gpt2 llama",
    f"strong-adamw {_student} {_taught} {_ten} {_adamw} gpt2 llama",
    f"strong-papers-loss {_student} {_taught} {_ten} {_published} --temperature=2 gpt2 llama",
    f"strong-alone-10 {_student} {_teacher} {_ten} {_offset} --weight_decay=1",
    f"strong-fixed {_student} {_taught} {_ten} {_fixed} {_cached} gpt2 llama",
    f"strong-fixed-6 {_student} {_taught} {_fixed} gpt2 llama",
    f"strong-alone {_student} {_teacher} --weight_decay=1",
    # two Llamas as its teachers (and fixed chunks), and parts of that taken away
    f"llama-muon1 {_large} {_teacher} --seed=+100",
    f"llama-muon2 {_large} {_teacher} --seed=+200",
    f"strong-llamas {_student} {_taught} {_ten} {_fixed} {_cached} llama-muon1 llama-muon2",
    f"strong-llamas-6 {_student} {_taught} {_fixed} llama-muon1 llama-muon2",
    f"strong-llamas-6-adamw {_student} {_taught} {_fixed} {_adamw} llama-muon1 llama-muon2",
    f"strong-llamas-6-papers-loss {_student} {_taught} {_fixed} {_published} --temperature=2 "
    "llama-muon1 llama-muon2",
    # BabyLlama-2
    f"equal1 {_student} --weight_decay=0.5 --seed=+100",
    f"equal2 {_student} --weight_decay=0.5 --seed=+200",
    f"babyllama2 {_student} {_published} --temperature=1 --weight_decay=0.5 equal1 equal2",
    # the loss as its equation reads, ensembles
    f"babyllama-token {_student} {_cached} gpt2 llama",
    "teachers ensemble gpt2 llama",
    "muon-teachers ensemble llama-muon1 llama-muon2",
    # self-distillation as Nair et al.'s 58-1 and 58-2, but of a plain model: their 58-0 is Baby Llama
    f"self1 {_student} {_cached} {_published} plain",
    f"self2 {_student} {_cached} {_published} plain self1",
    # DistilledGPT
    f"small-gpt2 {_small}",
    f"distilledgpt {_small} {_published} {_cached} small-gpt2 plain",
]
settings = ["--epochs=6", "--batch_size=16", "--learning_rate=2e-3", "--warmup_iters=100",
            "--eval_interval=0", "--eval_chunks=1024", "--log_interval=50", "--compile=on"]
data_dir = "data/million"
out_dir = "out/million"
test_loss = True
blimp = ["blimp_filtered", "supplement_filtered"]

# The papers' regime, more parameters than words and many epochs, at a size that two CPU cores carry: 200,513
# words (412,868 tokens), models of 1.4 to 2.6 million parameters, 6 epochs of 16 x 128 tokens. A run takes
# two to four minutes of one thread.
#   python prepare.py --input_dir=babylm --bos=line --vocab_size=2048 --train_fraction=0.02 \
#       --data_dir=data/million
#   OMP_NUM_THREADS=1 python -m tools.study config/study/million.py --seeds=1,2,3
# Baby Llama has two larger teachers of two kinds, BabyLlama-2 two of the student's own size and more weight
# decay, Tiny Minds two small ones and a GPT-2 as the student. Without dropout, which a CPU takes three times as
# long for (GPT-2's 0.1 in the papers).
_llama = "config/llama_16m.py --n_layer=4 --n_head=4"
_gpt2 = "config/gpt2_10m.py --n_layer=4 --n_head=4 --micro_batch_size=0 --weight_decay=0.1 --dropout=0"
_student = f"{_llama} --n_embd=128 --intermediate_size=384"
_published = "--kl_reduction=sequence"
runs = [
    f"plain {_student}",
    # Baby Llama
    f"gpt2 {_gpt2} --n_embd=192 --intermediate_size=768",
    f"llama {_llama} --n_embd=192 --intermediate_size=512",
    "teachers ensemble gpt2 llama",
    f"babyllama {_student} {_published} gpt2 llama",
    f"babyllama-token {_student} gpt2 llama",
    # BabyLlama-2
    f"equal1 {_student} --weight_decay=2 --seed=+100",
    f"equal2 {_student} --weight_decay=2 --seed=+200",
    "equals ensemble equal1 equal2",
    f"babyllama2 {_student} {_published} --temperature=1 --weight_decay=2 equal1 equal2",
    # self-distillation: 58-1 and 58-2 of Nair et al.
    f"self1 {_student} {_published} plain",
    f"self2 {_student} {_published} plain self1",
    # DistilledGPT
    f"small-gpt2 {_gpt2} --n_embd=128 --intermediate_size=512",
    f"distilledgpt {_gpt2} --n_embd=128 --intermediate_size=512 {_published} small-gpt2 plain",
]
settings = ["--epochs=6", "--batch_size=16", "--learning_rate=2e-3", "--warmup_iters=100",
            "--eval_interval=0", "--eval_chunks=1024", "--log_interval=50", "--compile=on"]
data_dir = "data/million"
out_dir = "out/million"
test_loss = True
blimp = ["blimp_filtered", "supplement_filtered"]

# Most of config/study/million.py at the papers' sizes, on the challenge's 10M words and GPUs. Not run: no
# figure of README or RESULTS.md is from here. The rates of config/strong_*.py were chosen at 1.4 million
# parameters: choose them anew first, with other seeds (python -m tools.sweep).
#   python prepare.py --input_dir=babylm --bos=line
#   python -m tools.study config/study/strict_small.py --seeds=1,2,3 --nproc_per_node=4
_student = "config/llama_58m.py"
_large = "config/llama_360m.py --seq_len=128"
_teacher, _taught = "config/strong_teacher.py", "config/strong_student.py"
_adamw = "--optimizer=adamw --learning_rate=3e-4 --weight_decay=0.1"
_published = "--kl_reduction=sequence"
runs = [
    f"plain {_student}",
    f"plain-10-offset {_student} --epochs=10 --random_offset=True",
    # Baby Llama
    "gpt2 config/gpt2_705m.py",
    f"llama {_large}",
    "babyllama config/babyllama.py gpt2 llama",
    "babyllama-10 config/babyllama.py --epochs=10 gpt2 llama",
    "babyllama-10-offset config/babyllama.py --epochs=10 --random_offset=True gpt2 llama",
    # beyond the papers, and parts of it taken away
    f"strong {_student} {_taught} gpt2 llama",
    f"strong-fixed {_student} {_taught} --random_offset=False gpt2 llama",
    f"strong-alone-10 {_student} {_teacher} --weight_decay=1 --epochs=10 --random_offset=True",
    f"strong-adamw {_student} {_taught} {_adamw} gpt2 llama",
    f"strong-papers-loss {_student} {_taught} {_published} --temperature=2 gpt2 llama",
    # two Llamas as its teachers
    f"llama-muon1 {_large} {_teacher} --seed=+100",
    f"llama-muon2 {_large} {_teacher} --seed=+200",
    f"strong-llamas {_student} {_taught} llama-muon1 llama-muon2",
    # BabyLlama-2
    "equal1 config/babyllama2_teacher.py --seed=+100",
    "equal2 config/babyllama2_teacher.py --seed=+200",
    "babyllama2 config/babyllama2.py equal1 equal2",
    # the loss as its equation reads, ensembles
    "babyllama-token config/babyllama.py --kl_reduction=token gpt2 llama",
    # self-distillation of a plain model
    f"self1 {_student} {_published} plain",
    f"self2 {_student} {_published} plain self1",
    # DistilledGPT
    "small-gpt2 config/tinyminds_gpt2_44m.py",
    "small-llama config/tinyminds_llama_60m.py",
    "distilledgpt config/distilledgpt_44m.py small-gpt2 small-llama",
]
settings = ["--eval_chunks=4096"]
data_dir = "data/babylm"
out_dir = "out/strict_small"
test_loss = True
blimp = ["blimp_filtered", "supplement_filtered"]

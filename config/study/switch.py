# GPT-2 with experts (Switch Transformer; Baby Llama, appendix B): 1, 2, 4 and 8 experts in every other layer
# beside the dense GPT2-10M, with capacity factors of 1, 1.25 and 2. The paper, which gives no numbers: one
# expert of capacity 1 is like the dense model, more experts or capacity are worse. Parameters: 10,480,128
# dense; 10,481,152 with one expert, 12,584,448 with two, 16,791,040 with four, 25,204,224 with eight.
#   python -m tools.study config/study/switch.py --seeds=1,2,3 --nproc_per_node=4
# Tokens are dropped in training alone; validation and scores drop nobody. The paper's authors had what
# transformers called SwitchTransformers in 2023: there a dropped token got p_e x in the place of 0, the noise
# of the router was on in evaluation too, and the balance counted the dropped as expert 0's.
_model = "config/gpt2_10m.py"
runs = [f"dense {_model}", f"1-expert {_model} --n_experts=1"]
runs += [
    f"{n}-experts-{percent} {_model} --n_experts={n} --expert_capacity={percent / 100:g}"
    for percent in (100, 125, 200) for n in (2, 4, 8)]
out_dir = "out/switch"

"""Asks the exported model, in transformers alone, what training never showed it: held-out pictures with a known answer.

python chat.py HF_FOLDER [number of questions a family]
"""

from __future__ import annotations

import sys

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from megatron_sts.data.scenes.source import evaluation_questions

FAMILIES = ("existence", "ocr", "choice")


def main() -> None:
    folder, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    processor, model = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
    for family in FAMILIES:
        for question in evaluation_questions(family, "eval", count, 7, "google"):
            answer = ask(processor, model, question.question, Image.fromarray(question.image()))
            print(f"{family}: {question.question} -> {answer} (right: {question.answer})", flush=True)


@torch.no_grad()
def ask(processor, model, text: str, image: Image.Image) -> str:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()

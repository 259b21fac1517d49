"""What ``sts_local.yaml`` names: how a document becomes pictures and text."""

from PIL import Image


def doc_to_visual(doc: dict[str, str]) -> list[Image.Image]:
    return [Image.open(doc["picture"])] if doc["picture"] else []


def doc_to_text(doc: dict[str, str]) -> str:
    return f"{doc['question']}\nAnswer the question using a single word or phrase."

"""Chat prompts for the dense model to answer: everyday questions, and questions about what the texts are about.

Made from templates, so that they carry nobody's licence; the words asked about come out of the gathered texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

TOPICS = (
    "the sun", "the moon", "gravity", "rain", "snow", "volcanoes", "rivers", "oceans", "forests", "deserts", "dogs",
    "cats", "horses", "birds", "bees", "whales", "dinosaurs", "trees", "flowers", "mushrooms", "apples", "bread",
    "cheese", "coffee", "tea", "chocolate", "rice", "pasta", "soup", "salt", "sugar", "water", "air", "fire", "iron",
    "gold", "glass", "paper", "plastic", "electricity", "magnets", "light", "sound", "atoms", "cells", "blood",
    "the heart", "the brain", "sleep", "dreams", "memory", "exercise", "vitamins", "vaccines", "bacteria", "viruses",
    "planets", "stars", "galaxies", "black holes", "rockets", "satellites", "computers", "the internet",
    "programming", "Python", "algorithms", "databases", "robots", "artificial intelligence", "mathematics",
    "prime numbers", "fractions", "triangles", "statistics", "history", "the Roman Empire", "the Renaissance",
    "democracy", "money", "banks", "trade", "music", "the piano", "the guitar", "painting", "photography", "films",
    "books", "poetry", "Shakespeare", "theatre", "football", "chess", "swimming", "cycling", "gardening", "cooking",
    "travel", "trains", "aeroplanes", "ships", "cars", "bicycles", "bridges", "houses", "clocks", "calendars",
    "seasons", "weather", "climate", "earthquakes", "recycling", "friendship", "honesty", "courage", "patience",
    "happiness", "teamwork", "learning", "teaching", "languages",
)  # fmt: skip
COUNTRIES = (
    "France", "Germany", "Italy", "Spain", "Portugal", "Poland", "Greece", "Norway", "Sweden", "Finland", "Denmark",
    "Austria", "Switzerland", "Belgium", "the Netherlands", "Ireland", "the United Kingdom", "Hungary", "Romania",
    "Russia", "Ukraine", "Turkey", "Egypt", "Morocco", "Kenya", "Nigeria", "South Africa", "Ethiopia", "India",
    "China", "Japan", "South Korea", "Vietnam", "Thailand", "Indonesia", "Australia", "New Zealand", "Canada",
    "the United States", "Mexico", "Cuba", "Brazil", "Argentina", "Chile", "Peru", "Colombia", "Iran", "Iraq",
    "Israel", "Saudi Arabia", "Pakistan",
)  # fmt: skip
_TOPIC_TEMPLATES = (
    "What is {}?", "Tell me something interesting about {}.", "Explain {} to a child.", "Why is {} important?",
    "Write a short poem about {}.", "Write two sentences about {}.", "What are three facts about {}?",
    "How does one learn more about {}?", "Write a short story about {}.", "What do people often get wrong about {}?",
    "Give me a list of five words that have to do with {}.", "Summarise what you know about {} in one sentence.",
    "What questions could I ask an expert on {}?", "Describe {} in simple words.", "Why do people like {}?",
    "Write a short e-mail to a friend about {}.", "What is the history of {}?", "Give me some advice about {}.",
)  # fmt: skip
_COUNTRY_TEMPLATES = (
    "What is the capital of {}?", "Where is {}?", "Which language do people speak in {}?", "What is {} famous for?",
    "Name a city in {}.", "What do people eat in {}?", "On which continent is {}?", "What is the currency of {}?",
    "Tell me about the history of {}.", "What should I see in {}?",
)  # fmt: skip
_WORD_TEMPLATES = (
    "What does the word “{}” mean?", "Define “{}”.", "Use the word “{}” in a sentence.", "What is a {}?",
    "Give me a synonym of “{}”.", "Explain the word “{}” simply.",
)  # fmt: skip
_CODE_TEMPLATES = (
    "Write a Python function for this: {}", "How would you do this in Python? {}", "Complete this Python code:\n\n{}",
    "Write a short Python example. {}",
)  # fmt: skip
_TASK_TEMPLATES = (
    "Explain this in simple words: {}", "Summarise this in one sentence: {}", "What does this mean? {}",
    "Rewrite this more simply: {}", "What is this text about? {}",
)  # fmt: skip
FOLLOW_UPS = (
    "Can you say that in fewer words?", "Can you give me an example?", "Why?", "Thank you! Can you tell me more?",
    "Explain that to a child.", "What else should I know?",
)  # fmt: skip


def prompts(texts: Path, count: int = 24_000, seed: int = 0) -> list[str]:
    """`count` different prompts in a random order that `seed` fixes. `texts` is what `demo.texts` gathered."""
    generator = random.Random(seed)
    common = [template.format(topic) for template in _TOPIC_TEMPLATES for topic in TOPICS]
    common += [template.format(country) for template in _COUNTRY_TEMPLATES for country in COUNTRIES]
    common += [f"What is {a} {sign} {b}?" for a in range(2, 20) for b in range(2, 20) for sign in "+-*"]
    sources = [_words(texts / "dictionary"), _code(texts / "python"), _passages(texts / "manuals"),
               _passages(texts / "prose"), _passages(texts / "kernel-docs")]  # fmt: skip
    found = dict.fromkeys(common)
    pools = [sorted(set(source)) for source in sources]
    for pool in pools:
        generator.shuffle(pool)
    for group in zip(*pools, strict=False):
        found.update(dict.fromkeys(group))
        if len(found) >= count:
            break
    for rest in pools[0]:  # words are what there are most of
        if len(found) >= count:
            break
        found[rest] = None
    chosen = list(found)[:count]
    generator.shuffle(chosen)
    return chosen


def _words(folder: Path) -> Iterator[str]:
    for text in _texts(folder):
        for number, word in enumerate(re.findall(r"^([A-Z][a-z]{3,12}) \\", text, re.MULTILINE)):
            yield _WORD_TEMPLATES[number % len(_WORD_TEMPLATES)].format(word.lower())


def _code(folder: Path) -> Iterator[str]:
    documented = r'    (def \w+\([^)\n]*\):)\n\s+"""([A-Z][^"\n]{20,120}\.)'
    for text in _texts(folder):
        for number, (head, summary) in enumerate(re.findall(documented, text)):
            template = _CODE_TEMPLATES[number % len(_CODE_TEMPLATES)]
            yield template.format(f'{head}\n    """{summary}"""' if "Complete" in template else summary)


def _passages(folder: Path) -> Iterator[str]:
    for text in _texts(folder):
        paragraphs = [" ".join(one.split()) for one in text.split("\n\n")]
        good = [
            one for one in paragraphs if 80 < len(one) < 320 and re.match(r"[A-Z][a-z]+ [a-z]", one) and one[-1] == "."
        ]
        for number, one in enumerate(good[:6]):
            yield _TASK_TEMPLATES[number % len(_TASK_TEMPLATES)].format(one)


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.txt")):
        yield path.read_text(encoding="utf-8")

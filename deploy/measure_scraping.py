"""What watching costs: decode throughput of a running server with and without scrapes at 1 s, in turns.

    python deploy/measure_scraping.py http://127.0.0.1:8000 [--rounds 12] [--streams 8] [--seconds 15]

Prints the ratio of throughputs with its 95 % interval (paired rounds, bootstrap), and how long /metrics took meanwhile.
The box must be idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
import urllib.request


def stream(url: str, over: threading.Event, counts: list[int], index: int) -> None:
    """Tokens of one stream after the other, counted as they come."""
    while not over.is_set():
        body = {"prompt": f"Story {index}: once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                counts[index] += line.startswith(b"data: {")
                if over.is_set():
                    return


def scrape(url: str, over: threading.Event, taken: list[float]) -> None:
    """/metrics every second."""
    while not over.wait(1.0):
        began_s = time.monotonic()
        with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
            answer.read()
        taken.append(time.monotonic() - began_s)


def throughput(url: str, counts: list[int], seconds: float, taken: list[float] | None) -> float:
    """Tokens a second over `seconds`, scraped if `taken` is given."""
    over = threading.Event()
    scraper = threading.Thread(target=scrape, args=(url, over, taken)) if taken is not None else None
    if scraper is not None:
        scraper.start()
    began_s, before = time.monotonic(), sum(counts)
    time.sleep(seconds)
    rate = (sum(counts) - before) / (time.monotonic() - began_s)
    over.set()
    if scraper is not None:
        scraper.join()
    return rate


def interval(ratios: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % of the means of resampled ratios."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return means[draws // 40], means[-draws // 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    over, counts, taken, ratios = threading.Event(), [0] * options.streams, list[float](), list[float]()
    clients = [
        threading.Thread(target=stream, args=(options.url, over, counts, i), daemon=True)
        for i in range(options.streams)
    ]
    for client in clients:
        client.start()
    throughput(options.url, counts, options.seconds, None)  # warm
    for number in range(options.rounds):
        order = (True, False) if number % 2 else (False, True)
        rates = {on: throughput(options.url, counts, options.seconds, taken if on else None) for on in order}
        ratios.append(rates[True] / rates[False])
        print(f"round {number + 1}: {rates[False]:.2f} tokens/s without, {rates[True]:.2f} with")
    over.set()
    low, high = interval(ratios)
    print(f"throughput with / without scraping: {statistics.fmean(ratios):.4f} (95 %: {low:.4f} to {high:.4f})")
    print(f"/metrics under load: median {1000 * statistics.median(taken):.1f} ms, slowest {1000 * max(taken):.1f} ms")


if __name__ == "__main__":
    main()

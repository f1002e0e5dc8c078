"""Writes train.jsonl and val.jsonl from the quickstart's events: a short answer is preferred to a long one."""

import json
from pathlib import Path

HERE = Path(__file__).parent
LONG = (
    "Thank you so much for letting me know! I have carefully taken note of your {title}, which is going to take place "
    "on {day} at {time}{place}. Please do not hesitate to tell me if there is anything else that I can do for you."
)
SHORT = "Noted: {title}, {day}, {time}{place}."


def main() -> None:
    """Write both files; the same rows every time."""
    for name, count in (("train.jsonl", 160), ("val.jsonl", 40)):
        lines = (HERE.parent / "quickstart" / name).read_text(encoding="utf-8").splitlines()[:count]
        rows = []
        for line in lines:
            asked, answered = (message["content"] for message in json.loads(line)["messages"])
            event = json.loads(answered)
            event["place"] = f" ({event['place']})" if event["place"] else ""
            rows.append({"prompt": asked, "chosen": SHORT.format(**event), "rejected": LONG.format(**event)})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

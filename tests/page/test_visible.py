from qlora_lightning.page.visible import show_controls


def test_what_cannot_be_seen_is_shown():
    assert show_controls("a\tb\nc") == "a⇥b\nc"
    assert show_controls("\x1b[31m\0\x7f\x9b") == "␛[31m␀␡\\u009b"
    assert show_controls("\N{RIGHT-TO-LEFT OVERRIDE}x\N{ZERO WIDTH SPACE}") == "\\u202ex\\u200b"
    assert show_controls("\U000e0041") == "\\U000e0041"
    assert show_controls("👩🏽‍🚀 é 日本") == "👩🏽‍🚀 é 日本"

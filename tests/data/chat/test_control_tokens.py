from qlora_lightning.data.chat.control_tokens import Control, ControlTokens


def test_in_texts_and_in_ids_by_hand(characters):
    controls = ControlTokens(characters, [])
    assert controls.ids == {"{": 123, "}": 125}
    assert controls.in_text("{u\nq}") == [Control(123, 0, 1), Control(125, 4, 5)]
    assert controls.in_ids([123, 117, 10, 113, 125]) == [0, 4]
    assert (controls.search("a}{"), controls.search("ab")) == ("}", None)


def test_a_stop_id_counts_whatever_the_tokenizer_says_of_it(characters):
    assert ControlTokens(characters, [ord("!")]).in_text("hi!") == [Control(33, 2, 3)]


def test_the_longest_control_token_is_taken(smol):
    smol.add_special_tokens({"additional_special_tokens": ["<|im_end|>>"]})
    (found,) = ControlTokens(smol, []).in_text("a<|im_end|>>b")
    assert found == Control(smol.convert_tokens_to_ids("<|im_end|>>"), 1, 12)


def test_texts_and_ids_of_a_real_tokenizer_agree(smol, talk):
    controls = ControlTokens(smol, [])
    text = smol.apply_chat_template(talk("q <b>", "[a]"), tokenize=False)
    ids = smol.encode(text, add_special_tokens=False)
    assert [ids[at] for at in controls.in_ids(ids)] == [control.id for control in controls.in_text(text)]
    assert len(controls.in_ids(ids)) == 6  # system prompt, question and answer, each begun and ended


def test_without_control_tokens_nothing_is_found(characters):
    characters.all_special_tokens = characters.all_special_ids = ()
    assert ControlTokens(characters, []).search("{a}") is None

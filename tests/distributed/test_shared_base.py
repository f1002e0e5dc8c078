from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.module import QLoRAModule


def test_ddp_sends_adapters_only_and_leaves_the_base_where_it_is_mapped(tiny_base):
    module = QLoRAModule(base=str(tiny_base), rank=2)
    module.configure_model()
    sent = module.state_dict().keys() | dict(module.named_parameters()).keys()
    sent -= set(module._ddp_params_and_buffers_to_ignore)
    assert sent == trainable_tensors(module).keys()

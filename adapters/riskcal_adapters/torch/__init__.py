"""Early-exit decoding with PyTorch: plain Hugging Face models in, nothing forked."""

from riskcal_adapters import _extras

try:
    from riskcal_adapters.torch.causal import EarlyExitCausalLM as EarlyExitCausalLM
    from riskcal_adapters.torch.checkpoints import load as load
    from riskcal_adapters.torch.checkpoints import load_example as load_example
    from riskcal_adapters.torch.checkpoints import load_t5 as load_t5
    from riskcal_adapters.torch.engine import Done as Done
    from riskcal_adapters.torch.engine import Engine as Engine
    from riskcal_adapters.torch.engine import EngineStats as EngineStats
    from riskcal_adapters.torch.engine import Request as Request
    from riskcal_adapters.torch.exit_head_checks import check_heads as check_heads
    from riskcal_adapters.torch.exit_head_files import load_heads as load_heads
    from riskcal_adapters.torch.exit_head_files import save_heads as save_heads
    from riskcal_adapters.torch.exit_heads import ExitHead as ExitHead
    from riskcal_adapters.torch.generation import Generation as Generation
    from riskcal_adapters.torch.smollm2 import load_smollm2 as load_smollm2
    from riskcal_adapters.torch.smollm2 import smollm2_heads as smollm2_heads
    from riskcal_adapters.torch.smollm2 import smollm2_parts as smollm2_parts
    from riskcal_adapters.torch.speculation import Speculation as Speculation
    from riskcal_adapters.torch.t5 import EarlyExitT5 as EarlyExitT5
except ModuleNotFoundError as error:
    raise _extras.missing(error, __name__, "torch") from None

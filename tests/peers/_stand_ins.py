"""Empty modules in place of nnsight, datasets and zstandard, which dictionary_learning imports.

They run models and read texts; SAEs need none of them.
"""

import sys
import types

for name, attribute in (("nnsight", "LanguageModel"), ("datasets", "load_dataset"), ("zstandard", "ZstdDecompressor")):
    sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[name], attribute, object)

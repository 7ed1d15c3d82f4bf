"""The schema of what ExecuTorch's Vulkan backend is handed (schema.fbs of that backend).

As far as our files need it; field numbers are slots of the flatbuffer. What stands in the place of
a storage or a datatype that is left out is not 0.
"""

from __future__ import annotations

from ..flatbuffer import Schema

MAGIC = b"VH00"  # of the header before the flatbuffer

VULKAN = Schema(
    identifier=b"VK00",
    root="VkGraph",
    tables={
        "VkGraph": {
            0: ("version", "string"),
            1: ("chain", "[OperatorCall]"),
            2: ("values", "[VkValue]"),
            3: ("input_ids", "[uint32]"),
            4: ("output_ids", "[uint32]"),
            5: ("constants", "[VkBytes]"),
            6: ("shaders", "[VkBytes]"),
        },
        "OperatorCall": {0: ("node_id", "uint32"), 1: ("name", "string"), 2: ("args", "[int32]")},
        "VkTensor": {
            0: ("datatype", "int8"),
            1: ("dims", "[uint32]"),
            2: ("constant_id", "int32"),
            3: ("mem_obj_id", "int32"),
            4: ("storage_type", "uint8"),
            5: ("memory_layout", "uint8"),
            6: ("staging_datatype", "int8"),
        },
        "Null": {},
        "Int": {0: ("int_val", "int64")},
        "Bool": {0: ("bool_val", "bool")},
        "Double": {0: ("double_val", "float64")},
        "IntList": {0: ("items", "[int64]")},
        "ValueList": {0: ("items", "[int32]")},
        "SymInt": {0: ("value", "int32")},
        "VkValue": {1: ("value", "GraphTypes")},
        "VkBytes": {0: ("offset", "uint64"), 1: ("length", "uint64"), 2: ("named_key", "string")},
    },
    unions={
        "GraphTypes": {
            name: name
            for name in (
                *("Null", "Int", "Double", "Bool", "VkTensor", "IntList", "DoubleList"),
                *("BoolList", "ValueList", "String", "SymInt"),
            )
        },
    },
    defaults={"VkTensor": {"storage_type": 255, "memory_layout": 255, "staging_datatype": 127}},
)

from maft_adapter.integrations.stage2 import main

from . import HOST

if __name__ == "__main__":
    main(HOST)

from posttrain.cli.main import main

raise SystemExit(main())

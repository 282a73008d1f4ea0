# A module for NixOS: gpuswitch with nixpkgs' own Python libraries.
#
#   imports = [ /path/to/gpuswitch/contrib/nix/module.nix ];
#   services.gpuswitch.enable = true;
#
# NixOS removes a service by building a system without it, and asks nobody: bring GPUs home first,
# gpuswitchctl to-host --all.
{ config, lib, pkgs, ... }:

let
  cfg = config.services.gpuswitch;
  python = pkgs.python3;
  toml = pkgs.formats.toml { };

  gpuswitch = python.pkgs.buildPythonApplication {
    pname = "gpuswitch";
    version = "0.1.0";
    pyproject = true;
    # Without what else lies in a checkout, such as .venv and .git.
    src = lib.fileset.toSource {
      root = ../..;
      fileset = lib.fileset.unions [
        ../../CHANGELOG.md
        ../../CONTRIBUTING.md
        ../../LICENSE
        ../../README.md
        ../../contrib
        ../../docs
        ../../gpuswitch
        ../../pyproject.toml
        ../../units
      ];
    };
    build-system = [ python.pkgs.hatchling ];
    dependencies = with python.pkgs; [
      asyncinotify
      dbus-next
      jeepney
      prometheus-client
      pydantic
      pydantic-settings
      pyudev
      rich
      transitions
      typing-extensions
    ];
    pythonImportsCheck = [ "gpuswitch.cli.main" "gpuswitch.daemon" ];

    # Paths that others read are the system's, and the same after an upgrade; those that we run are ours.
    postInstall = ''
      patchShebangs --build contrib/install.sh
      DESTDIR=$TMPDIR/stage PREFIX=/usr HOOK=$out/${python.sitePackages}/gpuswitch/hook.py contrib/install.sh stage
      for part in lib/systemd lib/sysusers.d share; do
        mkdir -p "$out/$(dirname "$part")"
        cp -r "$TMPDIR/stage/usr/$part" "$out/$part"
      done
      install -Dm755 "$TMPDIR/stage/usr/lib/gpuswitch/libvirt-hook" "$out/libexec/libvirt-hook"
      substituteInPlace "$out/lib/systemd/system/gpuswitchd.service" "$out/lib/systemd/system/gpuswitch-vfio@.service" \
        "$out/lib/systemd/user/gpuswitch-notify.service" \
        --replace-quiet /usr/bin/gpuswitch "$out/bin/gpuswitch" \
        --replace-quiet /usr/bin/busctl ${pkgs.systemd}/bin/busctl
      substituteInPlace "$out/share/dbus-1/system-services/org.gpuswitch1.service" \
        --replace-quiet /bin/false ${pkgs.coreutils}/bin/false
      substituteInPlace "$out/libexec/libvirt-hook" \
        --replace-fail '#!/bin/bash' '#!${pkgs.bash}/bin/bash' \
        --replace-fail /usr/bin/python3 ${python}/bin/python3
      substituteInPlace "$out/share/gpuswitch/proxmox/gpuswitch-hookscript" "$out/share/gpuswitch/slurm"/{features,health,prolog} \
        --replace-fail /usr/bin/python3 ${python}/bin/python3
      substituteInPlace "$out/share/gpuswitch/slurm"/{features,health,prolog} --replace-fail /usr/bin: "$out/bin:"
      substituteInPlace "$out/share/gpuswitch/slurm"/{helpers,slurm}.conf --replace-fail /usr/share "$out/share"
      substituteInPlace "$out/${python.sitePackages}/gpuswitch/hook.py" \
        --replace-fail /usr/bin/dbus-send ${pkgs.dbus}/bin/dbus-send
    '';
  };
in
{
  options.services.gpuswitch = {
    enable = lib.mkEnableOption "gpuswitch, which moves GPUs between their host drivers and vfio-pci";

    package = lib.mkOption {
      type = lib.types.package;
      default = gpuswitch;
      defaultText = lib.literalMD "gpuswitch, made of this checkout";
      description = "The package to use.";
    };

    settings = lib.mkOption {
      type = toml.type;
      default = { };
      example = { gpu = [ { address = "0000:01:00.0"; name = "rtx3070"; } ]; };
      description = "What gpuswitch.toml(5) describes: /etc/gpuswitch/config.toml.";
    };
  };

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];
    environment.etc."gpuswitch/config.toml" = lib.mkIf (cfg.settings != { }) {
      source = toml.generate "config.toml" cfg.settings;
    };

    services.dbus.packages = [ cfg.package ];
    security.polkit.enable = true;
    users.groups.gpuswitch = { };

    systemd.packages = [ cfg.package ];
    systemd.services.gpuswitchd = {
      wantedBy = [ "multi-user.target" ];
      path = [ pkgs.kmod pkgs.systemd ];
      restartTriggers =
        lib.mkIf (cfg.settings != { }) [ config.environment.etc."gpuswitch/config.toml".source ];
    };

    virtualisation.libvirtd.hooks.qemu."50-gpuswitch" = "${cfg.package}/libexec/libvirt-hook";
  };
}

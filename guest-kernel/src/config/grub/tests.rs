use super::*;

/// The shape of what grub-mkconfig writes on Debian.
const DEBIAN: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="0"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export menuentry_id_option
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
function gfxmode {
	set gfxpayload="${1}"
}
set linux_gfx_mode=
### BEGIN /etc/grub.d/10_linux ###
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-a1' {
	load_video
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	insmod part_gpt
	set root='hd0,gpt1'
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1  1111-aaaa
	else
	  search --no-floppy --fs-uuid --set=root 1111-aaaa
	fi
	echo	'Loading Linux 6.1.0-18-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-18-amd64 root=UUID=1111-aaaa ro quiet $vt_handoff
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.1.0-18-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-a1' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-18-amd64' --class debian $menuentry_id_option 'gnulinux-18' {
		linux	/boot/vmlinuz-6.1.0-18-amd64 root=UUID=1111-aaaa ro quiet
		initrd	/boot/initrd.img-6.1.0-18-amd64
	}
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-9-amd64 (recovery mode)' $menuentry_id_option 'gnulinux-9r' {
		linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=1111-aaaa ro single dyndbg="file drivers/usb/* +p"
		initrd	/boot/early.img /boot/initrd.img-6.1.0-9-amd64
	}
}
menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
	fwsetup
}
"#;

fn kernel(text: &str, grubenv: &[(&str, &str)]) -> Entry {
    let grubenv: Vec<_> = grubenv.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
    default_entry(text, &grubenv).unwrap()
}

#[test]
fn the_default_entry_of_a_distribution() {
    let entry = kernel(DEBIAN, &[]);
    let expected = Entry {
        title: "Debian GNU/Linux".into(),
        kernel: "/boot/vmlinuz-6.1.0-18-amd64".into(),
        initrds: vec!["/boot/initrd.img-6.1.0-18-amd64".into()],
        cmdline: "root=UUID=1111-aaaa ro quiet".into(),
        fs_uuid: Some("1111-aaaa".into()),
    };
    assert_eq!(entry, expected);
}

#[test]
fn an_entry_of_a_submenu_by_number_title_or_id() {
    for default in [
        "1>1",
        "gnulinux-advanced-a1>gnulinux-9r",
        "Advanced options for Debian GNU/Linux>1",
    ] {
        let entry = kernel(DEBIAN, &[("next_entry", default)]);
        assert_eq!(entry.kernel, "/boot/vmlinuz-6.1.0-9-amd64", "{default}");
        assert_eq!(entry.initrds, ["/boot/early.img", "/boot/initrd.img-6.1.0-9-amd64"]);
        assert_eq!(
            entry.cmdline,
            "root=UUID=1111-aaaa ro single \"dyndbg=file drivers/usb/* +p\""
        );
        assert_eq!(entry.fs_uuid, None);
    }
}

#[test]
fn a_default_that_boots_no_linux_or_is_gone_falls_back_to_the_first() {
    for default in ["2", "uefi-firmware", "9", "gone>1", "1>9"] {
        assert_eq!(
            kernel(DEBIAN, &[("next_entry", default)]).title,
            "Debian GNU/Linux",
            "{default}"
        );
    }
    // A submenu as default means its first entry.
    assert!(
        kernel(DEBIAN, &[("next_entry", "1")])
            .title
            .contains("with Linux 6.1.0-18")
    );
}

#[test]
fn the_saved_choice_is_followed() {
    let text = "load_env\nset default=\"${saved_entry}\"\nmenuentry a { linux /a }\nmenuentry b --id=x --id bb {\nlinux (hd0,1)/b $kernelopts\n}";
    let entry = kernel(text, &[("saved_entry", "bb"), ("kernelopts", "root=/dev/vda1 ro")]);
    assert_eq!(
        (entry.kernel.as_str(), entry.cmdline.as_str()),
        ("/b", "root=/dev/vda1 ro")
    );
    assert_eq!(
        kernel(&text.replace("load_env", ""), &[("saved_entry", "bb")]).kernel,
        "/a"
    );
}

#[test]
fn a_configuration_without_linux_entries_boots_nothing() {
    for text in [
        "",
        "blscfg\n",
        "menuentry x { chainloader +1 }",
        "linux /vmlinuz",
        "search.fs_uuid 1 root\nconfigfile /x",
    ] {
        assert_eq!(default_entry(text, &[]), None, "{text}");
    }
}
